"""What a user pays for, in turn, as one Markdown table: extraction, reading, verify, steps and totals."""

from __future__ import annotations

import platform

import extraction
import reading
import steps
import torch
import total
import verify
from side_by_side import HEADER


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")  # noqa: T201
    print(HEADER)  # noqa: T201
    for measure in (extraction.measure_all, reading.measure, verify.measure, steps.measure, total.measure):
        for found in measure():
            print(found.row, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
