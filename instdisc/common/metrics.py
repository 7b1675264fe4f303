"""All metrics that training, evaluation and serving export to Prometheus."""

from __future__ import annotations

from cluster.metrics import Metric, MetricTable

PREFIX = "instdisc_"
_SNAPSHOT_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)

TRAINING = MetricTable(
    prefix=PREFIX,
    metrics=(
        Metric("step_seconds", "histogram", "A whole step, from asking for a batch to the bank's update."),
        Metric("data_wait_seconds", "histogram", "Waiting for the batch of a step."),
        Metric(
            "exchange_seconds",
            "histogram",
            "Exchange between ranks in a step, waiting for slower ranks included.",
        ),
        Metric("objective_seconds", "histogram", "Loss and gradient of a step from this rank's rows."),
        Metric("optimizer_seconds", "histogram", "The optimizer's part of a step."),
        Metric(
            "snapshot_seconds", "histogram", "Writing and committing a snapshot.", buckets=_SNAPSHOT_BUCKETS
        ),
        Metric("images_total", "counter", "Images trained on."),
        Metric("exchange_bytes_total", "counter", "Bytes sent to other ranks, without DDP's gradients."),
        Metric("corrupt_images_total", "counter", "Distinct images that could not be decoded."),
        Metric(
            "restarts_total",
            "counter",
            "Of the run, from rank 0: restarts after a lost worker or node, since the command was started.",
        ),
        Metric("snapshot_failures_total", "counter", "Snapshots that could not be written or committed."),
        Metric("loss", "gauge", "Of the run: mean loss of the last step; NaN if it was not finite."),
        Metric("learning_rate", "gauge", "Of the run: learning rate of the last step."),
        Metric("gradient_norm", "gauge", "Of the run: L2 norm of the last step's gradient."),
        Metric("embedding_norm", "gauge", "Mean L2 norm of the embeddings before normalization."),
        Metric("positive_similarity", "gauge", "Of the run: mean cosine of an embedding and its own row."),
        Metric("negative_similarity", "gauge", "Of the run: mean cosine of an embedding and other rows."),
        Metric("log_partition", "gauge", "Of the run: logarithm of the normalizing constant Z."),
        Metric(
            "knn_accuracy_ratio", "gauge", "Of the run: top-1 of weighted kNN with recomputed embeddings."
        ),
        Metric("bank_knn_accuracy_ratio", "gauge", "Of the run: top-1 of weighted kNN with the stored bank."),
        Metric(
            "knn_balanced_accuracy_ratio",
            "gauge",
            "Of the run: mean over the classes of the accuracy of knn_accuracy_ratio.",
        ),
        Metric("knn_k", "gauge", "Of the run: neighbors that vote in knn_accuracy_ratio."),
        Metric(
            "instance_recall_ratio",
            "gauge",
            "Of the run: share of sampled images that another view of them finds among the others; no labels needed.",
        ),
        Metric("effective_rank", "gauge", "Of the run: effective rank of the embeddings of sampled images."),
        Metric("bank_rows", "gauge", "Rows of the bank that this rank owns."),
        Metric("bank_bytes", "gauge", "Memory of those rows."),
        Metric(
            "bank_element_bytes", "gauge", "Bytes of one number of the bank: 4 is float32, 2 half precision."
        ),
        Metric("epoch", "gauge", "Of the run: epochs completed, with fraction."),
        Metric("epochs", "gauge", "Of the run: epochs in total."),
        Metric("world_size", "gauge", "Of the run: ranks in the group."),
        Metric(
            "stopping",
            "gauge",
            "Of the run, from rank 0: 1 once somebody has stopped it on purpose, 0 until then.",
        ),
        Metric("snapshot_bytes", "gauge", "Of the run, from rank 0: size of the newest snapshot."),
        Metric(
            "snapshot_timestamp_seconds",
            "gauge",
            "Of the run, from rank 0: Unix time at which the newest snapshot was committed; before the first "
            "one, of the start.",
        ),
        Metric(
            "snapshot_age_seconds",
            "gauge",
            "Of the run, from rank 0: time since snapshot_timestamp_seconds.",
            since="snapshot_timestamp_seconds",
        ),
    ),
)
"""What the workers of a training run export."""

EVALUATION = MetricTable(
    prefix=PREFIX,
    targets="evaluation",
    # Alerts about lost workers select the job of the scrape configuration.
    labels={"job": "instdisc-evaluation"},
    metrics=(
        Metric("evaluation_queries_total", "counter", "Queries answered."),
        Metric(
            "evaluation_search_seconds", "histogram", "Answering one block of queries by all shards of rows."
        ),
        Metric("evaluation_actor_restarts_total", "counter", "Restarts of actors after a loss."),
        Metric("evaluation_actors", "gauge", "Actors that hold rows."),
        Metric("evaluation_rows", "gauge", "Rows that are searched."),
        Metric("evaluation_knn_top1_ratio", "gauge", "Top-1 accuracy of weighted kNN."),
        Metric("evaluation_knn_top5_ratio", "gauge", "Top-5 accuracy of weighted kNN."),
        Metric("evaluation_knn_k", "gauge", "Neighbors that vote in evaluation_knn_top1_ratio."),
    ),
)
"""What the evaluation job exports, from its driver, which is rank 0."""

SERVING = MetricTable(
    prefix=PREFIX,
    targets="serving",
    labels={"job": "instdisc-serving"},
    metrics=(
        Metric("serving_queries_total", "counter", "Queries answered."),
        Metric("serving_errors_total", "counter", "Queries that could not be answered: 503."),
        Metric(
            "serving_refused_total", "counter", "Requests answered with an error of any kind, 400 to 599."
        ),
        Metric(
            "serving_search_seconds",
            "histogram",
            "A query's search by all shards, waiting for others included.",
        ),
        Metric("serving_rows", "gauge", "Rows that are searched."),
        Metric("serving_actors", "gauge", "Actors that hold rows; 0: the replica holds them."),
        Metric(
            "serving_generation", "gauge", "State of the index that is searched; rises with every change."
        ),
    ),
)
"""What a replica of `instdisc.serve` exports; its rank is its number."""
