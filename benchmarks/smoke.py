"""The whole pipeline in under a minute: a few samples, then ten steps of every mode, in a temporary folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile

MODES = (["structured"], ["flat"], ["none"], ["flat", "--kv-control", "shuffled"])


def kvpipe(folder: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "kvpipe.cli.app", *arguments], cwd=folder, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        kvpipe(folder, "extract", "--model", "qwen", "--samples", "64", "--eval-samples", "16")
        for mode in MODES:
            kvpipe(folder, "distill", "--mode", *mode, "--max-steps", "10", "--max-new-tokens", "32")


if __name__ == "__main__":
    main()
