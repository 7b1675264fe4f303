"""What can be known of decoding on a GPU without one: the versions and the schemas of the installed libraries."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from nvidia.dali import Pipeline, backend

from pipelines import dali
from pipelines.augment import Augmentation
from pipelines.batch import LoaderJob
from tests.pipelines.images import collector, fail, in_order, load, photos
from tests.pipelines.test_corrupt_images import spoil


def test_nvjpeg_decodes_parts_of_images_with_smooth_chroma() -> None:
    """Older ones refuse, and all JPEGs are then decoded on the CPU, without a word."""
    (library,) = Path(torch.__file__).parents[1].glob("nvidia/**/libnvjpeg.so.13")
    version = []
    for field in range(2):  # MAJOR_VERSION, MINOR_VERSION
        value = ctypes.c_int()
        assert ctypes.CDLL(str(library)).nvjpegGetProperty(field, ctypes.byref(value)) == 0
        version.append(value.value)
    assert version >= [13, 2]


@pytest.mark.parametrize(("training", "views"), [(False, 1), (True, 1), (True, 2)])
def test_the_graph_for_gpus_is_accepted_and_its_outputs_are_there(
    tmp_path: Path, training: bool, views: int
) -> None:
    job = LoaderJob(
        manifest=photos(tmp_path, 1),
        requests=in_order(1, 1),
        augmentation=Augmentation(image_size=224),
        training=training,
        views=views,
        seed=0,
        device=torch.device("cuda", 0),
        threads=1,
        prefetch=1,
        on_corrupt=fail,
    )
    pipeline = Pipeline(batch_size=8, num_threads=2, device_id=0, prefetch_queue_depth=3)
    with pipeline:
        outputs = dali._graph(job, "mixed")
        pipeline.set_outputs(*outputs)
    assert [output.device for output in outputs] == ["gpu"] * views


@pytest.mark.parametrize("operator", ["decoders__Image", "decoders__ImageSlice"])
def test_the_decoders_know_the_options_that_are_used(operator: str) -> None:
    schema = backend.GetSchema(operator)
    for option in ("jpeg_fancy_upsampling", "adjust_orientation", "hw_decoder_load"):
        assert schema.HasArgument(option)


def test_a_broken_image_costs_few_pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each has decoders of its own: one that serves until then, two trials, and one that goes on."""
    made = []

    def counted(**options: Any) -> Pipeline:
        made.append(options)
        return Pipeline(**options)

    monkeypatch.setattr(dali, "Pipeline", counted)
    manifest, found = photos(tmp_path, 40), []
    spoil(manifest, {17})
    load(manifest, in_order(40, 40), "dali", on_corrupt=collector(found))
    assert [row for row, _, _ in found] == [17]
    assert len(made) == 4
