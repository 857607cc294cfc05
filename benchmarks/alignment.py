"""What aligner and KV loss take of a student's step, forward and backward, at real sizes: a 0.5B-shaped teacher with a
student of half its depth and width, and a 7B-shaped one with a 0.5B-shaped student. Random weights, random KV.

`python benchmarks/alignment.py`. Aim: <= 0.10 of the step.
"""

from __future__ import annotations

import time
from functools import partial

import torch
from kvpipe.kvcache.align.aligner import Aligner, AlignerConfig, Mode
from kvpipe.kvcache.align.head_projection import KVSpace
from kvpipe.kvcache.align.layer_map import layer_map
from kvpipe.kvcache.align.teacher_view import TeacherView
from kvpipe.pipeline.aligned_teacher import AlignedTeacher
from kvpipe.pipeline.distiller import KVDistiller
from kvpipe.pipeline.loss_terms import parse_kv_loss
from shapes import QWEN_05B, QWEN_7B, SMALLER
from side_by_side import HEADER, Ratio, alternate, of_values
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

PAIRS = {"0.5B -> smaller": (QWEN_05B, SMALLER), "7B -> 0.5B": (QWEN_7B, QWEN_05B)}
RECIPES: dict[str, tuple[Mode, str]] = {
    "flat, mse": ("flat", "mse"),
    "structured, mse": ("structured", "mse"),
    "bottleneck, mse": ("bottleneck", "mse"),
    "flat, hybrid": ("flat", "hybrid"),
    "identity, relation": ("identity", "relation"),
    "flat, mse and cka": ("flat", "mse,cka:0.1"),
}
RUNS = 5


def space(config: Qwen2Config) -> KVSpace:
    return KVSpace(config.num_key_value_heads, config.hidden_size // config.num_attention_heads)


def random_batch(teacher: Qwen2Config, device: torch.device, batch_size: int, num_tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(0, teacher.vocab_size - 200, (batch_size, num_tokens), device=device)
    kv = space(teacher)
    shape = (teacher.num_hidden_layers, 2, batch_size, kv.num_kv_heads, num_tokens, kv.head_dim)
    teacher_kv = torch.randn(shape, dtype=torch.bfloat16, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "teacher_kv": teacher_kv}


def step(distiller: KVDistiller, batch: dict[str, Tensor]) -> float:
    """Seconds of one forward and backward."""
    synchronise = torch.cuda.synchronize if batch["input_ids"].is_cuda else lambda: None
    synchronise()
    start = time.perf_counter()
    distiller(**batch)["loss"].backward()
    synchronise()
    seconds = time.perf_counter() - start
    distiller.zero_grad()
    return seconds


def measure(device: torch.device, batch_size: int, num_tokens: int, runs: int = RUNS) -> list[Ratio]:
    """For each pair and recipe, the share of the step that a student without KV does not take."""
    found = []
    for pair, (teacher, student_config) in PAIRS.items():
        student = Qwen2ForCausalLM._from_config(student_config, dtype=torch.float32).to(device)
        batch = random_batch(teacher, device, batch_size, num_tokens)
        view = TeacherView(layer_map("ratio", student_config.num_hidden_layers, teacher.num_hidden_layers))
        plain = KVDistiller(student, [AlignedTeacher(view)])
        distillers = {"none": plain} | {
            name: _distiller(student, view, teacher, student_config, *recipe) for name, recipe in RECIPES.items()
        }
        rounds = alternate({name: partial(step, one, batch) for name, one in distillers.items()}, runs)
        for name in RECIPES:
            shares = [1 - seconds["none"] / seconds[name] for seconds in rounds]
            found.append(of_values(f"alignment / step, {pair}, {name}", shares, aim=0.10))
    return found


def _distiller(
    student: Qwen2ForCausalLM, view: TeacherView, teacher: Qwen2Config, config: Qwen2Config, mode: Mode, loss: str
) -> KVDistiller:
    aligner = recipe_aligner(teacher, config, mode)
    return KVDistiller(student, [AlignedTeacher(view, aligner).to(student.device)], parse_kv_loss(loss))


def recipe_aligner(teacher: Qwen2Config, student: Qwen2Config, mode: Mode) -> Aligner | None:
    if mode == "identity":
        return None
    size = space(student).features // 2 if mode == "bottleneck" else None
    depth = student.num_hidden_layers
    return Aligner(AlignerConfig(mode, "student-to-teacher", depth, space(student), space(teacher), size=size))


if __name__ == "__main__":
    print(HEADER, *(found.row for found in measure(torch.device("cpu"), 1, 64)), sep="\n")  # noqa: T201
