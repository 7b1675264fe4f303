"""Every chart of the Grafana dashboard, as one table of expressions.

A run is told from others by `cluster, namespace, run`. Charts of nodes show those on which workers of the chosen runs
are: Ray's metrics know a node by its address, NVIDIA's dcgm-exporter knows a GPU by its pod.
"""

from __future__ import annotations

from dataclasses import dataclass

BY = "cluster, namespace, run"
NAME = "{{cluster}} {{namespace}} {{run}}"
RUN = 'cluster=~"$cluster", namespace=~"$namespace", run=~"$run"'
RANK = f'{RUN}, rank=~"$rank"'
WORKERS = f"cluster_namespace_run_pod_ip:instdisc_world_size:count{{{RUN}}}"

Target = tuple[str, str]
"""An expression and its legend."""


@dataclass(frozen=True)
class Chart:
    """One panel.

    Attributes:
        title: Above it.
        targets: What it shows.
        unit: As Grafana calls it.
        text: Its description.
        kind: Grafana's type of panel. An `xychart` draws its other targets against the first; legends name the axes.
        stacked: Whether the lines add up.
    """

    title: str
    targets: list[Target]
    unit: str = "short"
    text: str = ""
    kind: str = "timeseries"
    stacked: bool = False


def of_run(metric: str, legend: str = "", function: str = "max") -> Target:
    """One line for each run."""
    return f"{function} by ({BY}) (instdisc_{metric}{{{RUN}}})", f"{NAME} {legend}".strip()


def of_rank(metric: str) -> Target:
    """One line for each rank."""
    return f"instdisc_{metric}{{{RANK}}}", f"{NAME} {{{{rank}}}}"


def rate(metric: str) -> str:
    """Per second, for each rank."""
    return f"rate(instdisc_{metric}{{{RANK}}}[$__rate_interval])"


def rate_of_run(metric: str, over: str = "", legend: str = "") -> Target:
    """Per second, or over another metric's rate, for each run."""
    shared = f" / sum by ({BY}) ({rate(over)})" if over else ""
    return f"sum by ({BY}) ({rate(metric)}){shared}", f"{NAME} {legend}".strip()


def rate_of_rank(metric: str, over: str = "") -> Target:
    """As `rate_of_run`, for each rank."""
    return rate(metric) + (f" / {rate(over)}" if over else ""), f"{NAME} {{{{rank}}}}"


def quantiles(histogram: str) -> list[Target]:
    """Median and 95% of a histogram over all ranks."""
    buckets = f"sum by ({BY}, le) ({rate(histogram + '_bucket')})"
    return [
        (f"histogram_quantile({quantile}, {buckets})", f"{NAME} {legend}")
        for quantile, legend in ((0.5, "median"), (0.95, "95%"))
    ]


def of_gpus(metric: str) -> list[Target]:
    """One line for each GPU. The exporter's own pod is not meant where Prometheus renamed the labels of the GPU's."""
    for label in ("namespace", "pod"):
        metric = f'label_replace({metric}, "{label}", "$1", "exported_{label}", "(.+)")'
    return [(f"{metric} and on (cluster, namespace, pod) {WORKERS}", "{{Hostname}} {{pod}} GPU {{gpu}}")]


def on_nodes(metric: str) -> str:
    """A metric of Ray's on the nodes of the runs."""
    return f"{metric} and on (cluster, namespace, ip) {WORKERS}"


def of_nodes(*metrics: str) -> list[Target]:
    """One line for each node, and metric, if there are several."""
    return [
        (on_nodes(metric), "{{ip}} " + (metric.rpartition("_node_")[2] if metrics[1:] else ""))
        for metric in metrics
    ]


def of_processes(metric: str) -> list[Target]:
    """One line for each of the kinds of processes on a node that need most."""
    return [(f"topk(5, sum by (ip, Component) ({on_nodes(metric)}))", "{{ip}} {{Component}}")]


def of_ray(metric: str, *labels: str) -> list[Target]:
    """A metric of the Ray clusters in which the runs are, summed over all but these labels."""
    here = f"{metric} and on (cluster, namespace, SessionName) ({on_nodes('ray_node_cpu_utilization')})"
    return [(f"sum by ({', '.join(labels)}) ({here})", " ".join(f"{{{{{label}}}}}" for label in labels))]


EPOCH = (of_run("epoch")[0], "epoch")
STEP = "step_seconds_sum"
ROWS = {
    "Training": [
        Chart("Loss", [of_run("loss")], text="Mean of the last step over all ranks."),
        Chart("Loss by epoch", [EPOCH, (of_run("loss")[0], "loss")], kind="xychart"),
        Chart(
            "kNN accuracy by epoch",
            [
                EPOCH,
                (of_run("knn_accuracy_ratio")[0], "recomputed embeddings"),
                (of_run("bank_knn_accuracy_ratio")[0], "bank"),
                (of_run("knn_balanced_accuracy_ratio")[0], "mean over classes"),
            ],
            "percentunit",
            kind="xychart",
        ),
        Chart(
            "Instance recall by epoch",
            [EPOCH, (of_run("instance_recall_ratio")[0], "recall at 1")],
            "percentunit",
            "Sampled images that another view of them finds among the others: needs no labels.",
            kind="xychart",
        ),
        Chart("Effective rank", [of_run("effective_rank")], text="Of the embeddings of sampled images."),
        Chart("Images per second", [rate_of_run("images_total")]),
        Chart("Step time", quantiles("step_seconds"), "s"),
        Chart(
            "Where a step goes",
            [
                rate_of_run("data_wait_seconds_sum", STEP, "data wait"),
                rate_of_run("exchange_seconds_sum", STEP, "exchange"),
                rate_of_run("objective_seconds_sum", STEP, "objective"),
                rate_of_run("optimizer_seconds_sum", STEP, "optimizer"),
            ],
            "percentunit",
            "Shares of the step; the rest is the network, forward and backward, with the all-reduce of its gradients.",
            stacked=True,
        ),
        Chart(
            "Epochs done",
            [(f"{of_run('epoch')[0]} / {of_run('epochs')[0]}", NAME)],
            "percentunit",
        ),
        Chart("Learning rate", [of_run("learning_rate")]),
        Chart("Gradient norm", [of_run("gradient_norm")]),
        Chart(
            "Workers",
            [
                of_run("world_size", "in the group"),
                of_run("world_size", "answering", "count"),
                of_run("stopping", "stopping"),
            ],
            text="Fewer answering than in the group: workers are lost. Stopping is 1 while the run ends on request.",
        ),
    ],
    "Objective": [
        Chart(
            "Similarity to the own row and to others",
            [of_run("positive_similarity", "own"), of_run("negative_similarity", "others")],
            text="Cosines. Own should rise and stay well above others.",
        ),
        Chart("log Z", [of_run("log_partition")], text="Logarithm of the normalizing constant of NCE."),
        Chart("Embedding norm before normalization", [of_rank("embedding_norm")]),
        Chart("Objective time", quantiles("objective_seconds"), "s"),
    ],
    "Loader": [
        Chart(
            "Fraction of the time waiting for images",
            [rate_of_rank("data_wait_seconds_sum", STEP)],
            "percentunit",
        ),
        Chart("Wait for a batch", quantiles("data_wait_seconds"), "s"),
        Chart(
            "Corrupt images",
            [of_rank("corrupt_images_total")],
            text="Different ones since the worker started.",
        ),
    ],
    "Exchange": [
        Chart(
            "Bytes sent per second",
            [rate_of_rank("exchange_bytes_total")],
            "Bps",
            "Queries, partial results and rows; the gradients of DDP come on top.",
        ),
        Chart(
            "Bytes sent per step",
            [rate_of_rank("exchange_bytes_total", "step_seconds_count")],
            "bytes",
            "Depends on batch and embedding size alone.",
        ),
        Chart("Exchange time", quantiles("exchange_seconds"), "s"),
        Chart(
            "Mean exchange time by rank",
            [rate_of_rank("exchange_seconds_sum", "exchange_seconds_count")],
            "s",
            "The rank that waits least is the one the others wait for.",
        ),
        Chart("Optimizer time", quantiles("optimizer_seconds"), "s"),
    ],
    "Durability": [
        Chart("Age of the newest snapshot", [of_run("snapshot_age_seconds", function="min")], "s"),
        Chart(
            "Newest snapshot committed",
            [(f"1000 * {of_run('snapshot_timestamp_seconds')[0]}", NAME)],
            "dateTimeAsIso",
            "Before the first snapshot: when training started.",
            kind="stat",
        ),
        Chart("Size of the newest snapshot", [of_run("snapshot_bytes")], "bytes"),
        Chart(
            "Time to write a snapshot", [rate_of_run("snapshot_seconds_sum", "snapshot_seconds_count")], "s"
        ),
        Chart("Failed snapshots", [of_run("snapshot_failures_total", function="sum")]),
        Chart("Restarts of the worker group", [of_run("restarts_total")]),
        Chart("Rows of the bank by rank", [of_rank("bank_rows")]),
        Chart("Memory of the bank", [of_run("bank_bytes", function="sum")], "bytes"),
        Chart(
            "Bytes of a number of the bank",
            [of_run("bank_element_bytes")],
            text="4: float32, 2: half precision.",
        ),
    ],
    "Evaluation": [
        Chart(
            "kNN accuracy of the evaluation job",
            [of_run("evaluation_knn_top1_ratio", "top-1"), of_run("evaluation_knn_top5_ratio", "top-5")],
            "percentunit",
        ),
        Chart(
            "Neighbors that vote, k", [of_run("knn_k", "training"), of_run("evaluation_knn_k", "evaluation")]
        ),
        Chart("Queries per second", [rate_of_run("evaluation_queries_total")]),
        Chart("Search of a block of queries", quantiles("evaluation_search_seconds"), "s"),
        Chart(
            "Actors",
            [
                of_run("evaluation_actors", "holding rows"),
                of_run("evaluation_actor_restarts_total", "restarted", "sum"),
            ],
        ),
        Chart("Rows searched", [of_run("evaluation_rows")]),
    ],
    "GPU": [
        Chart("GPU utilisation", of_gpus("DCGM_FI_DEV_GPU_UTIL"), "percent", "Time with a kernel running."),
        Chart(
            "Tensor cores",
            of_gpus("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"),
            "percentunit",
            "Cycles in which they compute; not on every GPU.",
        ),
        Chart("GPU memory", of_gpus("DCGM_FI_DEV_FB_USED"), "mbytes"),
        Chart("Power", of_gpus("DCGM_FI_DEV_POWER_USAGE"), "watt"),
        Chart("Temperature", of_gpus("DCGM_FI_DEV_GPU_TEMP"), "celsius"),
        Chart(
            "Last error (Xid)",
            of_gpus("DCGM_FI_DEV_XID_ERRORS"),
            text="0: none. NVIDIA documents the numbers.",
        ),
    ],
    "Processor": [
        Chart("Processors of a node", of_nodes("ray_node_cpu_utilization"), "percent"),
        Chart(
            "Processor time by process",
            of_processes("ray_component_cpu_percentage"),
            "percent",
            "100% is one processor.",
        ),
    ],
    "Memory": [
        Chart("Memory of a node", of_nodes("ray_node_mem_used", "ray_node_mem_total"), "bytes"),
        Chart(
            "Memory by process",
            of_processes("ray_component_rss_bytes"),
            "bytes",
            "Resident, shared memory included.",
        ),
        Chart("Shared memory", of_nodes("ray_node_mem_shared_bytes"), "bytes"),
    ],
    "Network and disk": [
        Chart("Network", of_nodes("ray_node_network_receive_speed", "ray_node_network_send_speed"), "Bps"),
        Chart("Disk", of_nodes("ray_node_disk_io_read_speed", "ray_node_disk_io_write_speed"), "Bps"),
        Chart("Disk space", of_nodes("ray_node_disk_usage", "ray_node_disk_free"), "bytes"),
    ],
    "Ray": [
        Chart("Processors and GPUs reserved", of_ray('ray_resources{Name=~"CPU|GPU"}', "Name", "State")),
        Chart("Ray actors", of_ray("ray_actors", "State")),
        Chart("Object store", of_ray("ray_object_store_memory", "Location"), "bytes"),
    ],
}
