"""Extraction on a GPU: wall over bare forward for Qwen2.5-0.5B- and 7B-shaped teachers with random weights; raw, in
four bits, and with half of the tokens evicted by R-KV. And what alignment adds to a student's step.

`python benchmarks/gpu.py` needs a CUDA device and about 40 GB of it for the larger shape. Aim: <= 1.10.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import alignment
import extraction
import torch
from kvpipe.pipeline.models import load_tokenizer
from shapes import QWEN_05B, QWEN_7B
from side_by_side import HEADER
from transformers import Qwen2ForCausalLM

SHAPES = {"qwen2.5-0.5b-shape": QWEN_05B, "qwen2.5-7b-shape": QWEN_7B}

KEPT: list[dict[str, Any]] = [{}, {"codec": "int4"}, {"evict": "rkv", "budget": 0.5}]


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n{HEADER}")  # noqa: T201
    for name, config in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            with torch.device("cuda"):
                Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(path)
            load_tokenizer("qwen").save_pretrained(path)
            for kept in KEPT:
                for found in extraction.measure(str(path), device="cuda", samples=600, **kept):
                    print(found.row, flush=True)  # noqa: T201
    for found in alignment.measure(torch.device("cuda"), batch_size=8, num_tokens=512):
        print(found.row, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
