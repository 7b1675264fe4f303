"""Find the training images nearest to image files: `python -m examples.embed_and_search RUN IMAGE…`."""

from __future__ import annotations

import sys

import instdisc


def main(source: str, *images: str) -> None:
    run = instdisc.open_run(source)
    vectors = run.embed(images)
    scores, rows = run.nearest(vectors, k=5)
    keys = run.keys()
    for query, image in enumerate(images):
        print(image)
        for score, row in zip(scores[query], rows[query], strict=True):
            print(f"  {score:.3f}  {keys[row]} (row {row})")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
