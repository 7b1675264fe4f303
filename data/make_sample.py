"""Draw the bundled sample from CIFAR-10 (Krizhevsky, "Learning multiple layers of features", 2009).

    python data/make_sample.py cifar10-png.tar

reads `train/<class>/<name>.png` and `test/<class>/<name>.png` and writes, beside this script,
`sample-train.tar.gz` (500 images of each class) and `sample-test.tar.gz` (100 of each) in WebDataset
layout, and `classnames.txt`. The images are drawn at random: within a class, neighbors in the list look
alike, so the first images would be an easier data set. Compressed, because headers and padding of a tar take
more room than images as small as these; `pipelines.datasets.resolve("sample")` unpacks it.
"""

import argparse
import gzip
import io
import random
import tarfile
from collections import defaultdict
from pathlib import Path, PurePosixPath

from pipelines.webdataset import Sample, write_samples

PER_CLASS = {"train": 500, "test": 100}


def make_sample(source: Path, seed: int, out: Path) -> None:
    """Write the sample of the tar `source` into the folder `out`; equal arguments give equal tar bytes."""
    generator = random.Random(seed)
    with tarfile.open(source) as tar:
        members: dict[tuple[str, str], dict[str, tarfile.TarInfo]] = defaultdict(dict)
        for member in tar:
            if member.isfile():
                split, class_name, _ = PurePosixPath(member.name).parts
                members[split, class_name][member.name] = member
        class_names = sorted({class_name for _, class_name in members})
        for split, count in PER_CLASS.items():
            samples = []
            for label, class_name in enumerate(class_names):
                found = members[split, class_name]
                for name in sorted(generator.sample(sorted(found), count)):
                    image = tar.extractfile(found[name])
                    assert image is not None, name
                    samples.append(Sample(f"{class_name}/{PurePosixPath(name).stem}", image.read(), label))
            buffer = io.BytesIO()
            write_samples(buffer, samples)
            # mtime=0: no time in the header, so that equal contents compress to equal bytes.
            (out / f"sample-{split}.tar.gz").write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    (out / "classnames.txt").write_text("".join(f"{name}\n" for name in class_names))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="tar file of CIFAR-10 as PNG")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    arguments = parser.parse_args()
    make_sample(arguments.source, arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
