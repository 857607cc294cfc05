"""Peak memory of extracting 50,000 samples over that of 1,000: it is bounded by batches and shards, not by the store.

`python benchmarks/memory.py`, on Linux; minutes, and 7 GB of disk. Each extraction is a process of its own, whose peak
is the kernel's. What grows are the samples' text and tokens, which an extraction holds: the second ratio tells how
much, over the bytes of the KV that was written meanwhile.
"""

from __future__ import annotations

import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from side_by_side import HEADER, Ratio, of_values, quiet

FEW, MANY = 1_000, 50_000
RUNS = 1  # A peak hardly varies.


def measure(runs: int = RUNS) -> list[Ratio]:
    few, many = ([_in_a_process(samples) for _ in range(runs)] for samples in (FEW, MANY))
    peaks = [after / before for (before, _), (after, _) in zip(few, many, strict=True)]
    grown = [(after - before) / size for (before, _), (after, size) in zip(few, many, strict=True)]
    return [
        of_values(f"peak memory, {MANY:,} samples / {FEW:,}", peaks, aim=1.1),
        of_values("what it grew / KV written", grown, aim=0.02),
    ]


def _in_a_process(samples: int) -> tuple[int, int]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_extract, samples).result()


def _extract(samples: int) -> tuple[int, int]:
    """Peak bytes of this process, and bytes of the KV that it wrote."""
    from kvpipe.pipeline.extract import extract
    from kvpipe.pipeline.extract_config import ExtractConfig

    with tempfile.TemporaryDirectory() as folder:
        report = extract(ExtractConfig("qwen", Path(folder) / "x.zarr", samples=samples), quiet())
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024, report.bytes_written


if __name__ == "__main__":
    print(HEADER, *(found.row for found in measure()), sep="\n")  # noqa: T201
