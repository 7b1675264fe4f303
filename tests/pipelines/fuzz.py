"""Damaged images among good ones, through the DALI loader: `python -m tests.pipelines.fuzz --mutations 500`.

Every accepted form is damaged by bit flips, cuts, edits of its header and the like, and loaded in batches of 128 with
images that are whole. The process must live, the images named must be those that Pillow refuses, and the others must
keep their pixels. To be run as a process of its own, for a crash of DALI cannot be caught.
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipelines.augment import Augmentation
from pipelines.decode import CorruptImage, decode_rgb
from pipelines.headers import HeaderError, image_size
from pipelines.order import Request
from tests.pipelines.forms import forms
from tests.pipelines.images import collector, encode, load, photo, pixels, write_images

BATCH, MUTANTS = 128, 32
_AUGMENTATION = Augmentation(
    image_size=32, contrast=0, brightness=0, saturation=0, hue=0, grayscale_probability=0
)
_LARGEST = 1 << 20  # pixels; what a damaged header makes larger is listed with the size of the whole image
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)

Damage = Callable[[bytes, np.random.Generator], bytes]


class Mutant(NamedTuple):
    form: str
    damage: str
    data: bytes
    size: tuple[int, int]
    """What the manifest says."""


def flip_bits(data: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for position in random.integers(0, len(data), random.integers(1, 9)):
        changed[position] ^= 1 << random.integers(0, 8)
    return bytes(changed)


def cut(data: bytes, random: np.random.Generator) -> bytes:
    return data[: random.integers(1, len(data))]


def cut_and_end(data: bytes, random: np.random.Generator) -> bytes:
    """Cut short, but for the last bytes, which the end of an image is told by."""
    start = int(random.integers(1, len(data)))
    return data[:start] + data[-min(16, len(data) - start) :]


def edit_header(data: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for position in random.integers(0, min(len(data), 200), random.integers(1, 4)):
        changed[position] = random.choice(_NUMBERS)
    return bytes(changed)


def edit_anywhere(data: bytes, random: np.random.Generator) -> bytes:
    """Overwrite a short run of bytes; TIFFs have their header at their end."""
    position, length = int(random.integers(0, len(data))), int(random.integers(1, 9))
    return (data[:position] + random.bytes(length) + data[position + length :])[: len(data)]


def leave_out(data: bytes, random: np.random.Generator) -> bytes:
    start, stop = sorted(random.integers(0, len(data), 2).tolist())
    return data[:start] + data[stop:]


def insert(data: bytes, random: np.random.Generator) -> bytes:
    position = int(random.integers(0, len(data)))
    return data[:position] + random.bytes(int(random.integers(1, 100))) + data[position:]


DAMAGES: tuple[Damage, ...] = (flip_bits, cut, cut_and_end, edit_header, edit_anywhere, leave_out, insert)


def mutants(count: int, seed: int) -> list[Mutant]:
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        name, form = list(forms().items())[number % len(forms())]
        damage = DAMAGES[random.integers(len(DAMAGES))]
        data = damage(form.data, random) or b"\0"
        size = form.look.height, form.look.width
        try:  # what a scan would find; or the damage came after the scan
            scanned = image_size(lambda length, data=data: data[:length], len(data))  # type: ignore[misc]
            if random.random() < 0.5 and scanned[0] * scanned[1] <= _LARGEST:
                size = scanned
        except HeaderError:
            pass
        found.append(Mutant(name, damage.__name__, data, size))
    return found


def refusal(mutant: Mutant) -> str:
    """Why Pillow refuses the image; empty if it does not."""
    try:
        decode_rgb(mutant.data, *mutant.size)
    except CorruptImage as corrupt:
        return str(corrupt)
    return ""


def run(count: int, seed: int) -> dict[str, object]:
    """Load `count` damaged images; says what went wrong."""
    mates = [
        encode(photo(40 + n % 31, 36 + n % 43, n), ("JPEG", "PNG")[n % 2]) for n in range(BATCH - MUTANTS)
    ]
    sizes = [(40 + n % 31, 36 + n % 43) for n in range(BATCH - MUTANTS)]
    with tempfile.TemporaryDirectory() as folder:
        alone = write_images(Path(folder), mates, sizes)
        request = Request(0, np.arange(len(mates)))
        clean = {views: _load(alone, request, views, [])[0] for views in (1, 2)}
    tally: Counter[str] = Counter()
    wrong: list[str] = []
    for start in range(0, count, MUTANTS):
        batch = mutants(min(MUTANTS, count - start), seed + start)
        wrong += _run_batch(batch, mates, sizes, clean, np.random.default_rng(seed + start), tally)
        logging.info("%d of %d, %d wrong", start + len(batch), count, len(wrong))
    return {"mutations": count, "seed": seed, **tally, "wrong": wrong}


def _run_batch(
    batch: list[Mutant],
    mates: list[bytes],
    sizes: list[tuple[int, int]],
    clean: dict[int, torch.Tensor],
    random: np.random.Generator,
    tally: Counter[str],
) -> list[str]:
    reasons = {len(mates) + index: refusal(mutant) for index, mutant in enumerate(batch)}
    expected = {row for row, reason in reasons.items() if reason}
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_images(
            Path(folder), mates + [mutant.data for mutant in batch], sizes + [mutant.size for mutant in batch]
        )
        views = int(random.integers(1, 3))
        request = Request(0, random.permutation(len(manifest)))
        named: list[tuple[int, str, str]] = []
        images, ids = _load(manifest, request, views, named)
        others, _ = _load(manifest, request, views, [], backend="host")
    tally["refused"] += len(expected)
    tally["accepted"] += len(batch) - len(expected)
    wrong = []
    for row in expected.symmetric_difference(row for row, _, _ in named):
        what = f"not named, {reasons[row]}" if row in expected else "named"
        wrong.append(f"{batch[row - len(mates)][:2] if row >= len(mates) else row}: {what}")
    for place, row in enumerate(request.rows.tolist()):
        if row < len(mates):
            if ids[place] != row or not torch.equal(images[:, place], clean[views][:, row]):
                wrong.append(f"mate {row} changed")
        elif row not in expected and (apart := (images[:, place] - others[:, place]).abs().mean()) > 1:
            wrong.append(f"{batch[row - len(mates)][:2]}: decoders differ by {apart:.1f}")
    return wrong


def _load(
    manifest: object, request: Request, views: int, named: list[tuple[int, str, str]], backend: str = "dali"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (V, B, 3, S, S) and ids of one batch; one view takes the fused decoder, two the plain one."""
    (batch,) = load(
        manifest,  # type: ignore[arg-type]
        [request],
        backend,
        augmentation=_AUGMENTATION,
        views=views,
        threads=2,
        on_corrupt=collector(named),
    )
    return pixels(batch, _AUGMENTATION), batch.instance_ids


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="say how far it is on standard error")
    arguments = parser.parse_args()
    if arguments.verbose:
        logging.basicConfig(level=logging.INFO)
    warnings.simplefilter("ignore")  # Pillow, of damaged TIFFs
    start = time.perf_counter()
    found = run(arguments.mutations, arguments.seed)
    print(json.dumps(found | {"seconds": round(time.perf_counter() - start)}))


if __name__ == "__main__":
    main()
