"""Every benchmark in turn, as one Markdown table: the one in docs/benchmarks.md."""

from __future__ import annotations

import platform

import extraction
import steps
import torch
import total
from side_by_side import HEADER


def main() -> None:
    rows = [extraction.measure(), extraction.measure(dtype="float32"), *steps.measure(), *total.measure()]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")  # noqa: T201
    print(HEADER, *(found.row for found in rows), sep="\n")  # noqa: T201


if __name__ == "__main__":
    main()
