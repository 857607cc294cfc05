"""Would torch.compile pay? Aligner and KV loss alone, forward and backward, compiled over plain; at the sizes of
benchmarks/alignment.py, random KV.

`python benchmarks/compiled.py`. Aim: what would be worth the minutes that compiling takes, <= 0.7.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from alignment import PAIRS, RECIPES, random_batch, recipe_aligner, space
from kvpipe.kvcache.align.layer_map import layer_map
from kvpipe.kvcache.align.teacher_view import TeacherView
from kvpipe.pipeline.aligned_teacher import AlignedTeacher
from kvpipe.pipeline.loss_terms import kv_loss, parse_kv_loss
from side_by_side import HEADER, Ratio, alternate, ratio
from torch import Tensor

RUNS = 7


def measure(device: torch.device, batch_size: int, num_tokens: int, runs: int = RUNS) -> list[Ratio]:
    found = []
    for pair, (teacher, student) in PAIRS.items():
        view = TeacherView(layer_map("ratio", student.num_hidden_layers, teacher.num_hidden_layers))
        batch, kv = random_batch(teacher, device, batch_size, num_tokens), space(student)
        shape = (student.num_hidden_layers, 2, batch_size, kv.num_kv_heads, num_tokens, kv.head_dim)
        student_kv = torch.randn(shape, device=device, requires_grad=True)
        for name, (mode, loss) in RECIPES.items():
            aligned = AlignedTeacher(view, recipe_aligner(teacher, student, mode)).to(device)
            torch.compiler.reset()  # else the ninth recipe and all that follow would run as they are
            plain = partial(_loss, aligned, loss, batch)
            timed = {"plain": _timed(plain, student_kv), "compiled": _timed(torch.compile(plain), student_kv)}
            rounds = alternate(timed, runs)
            found.append(ratio(f"compiled / plain, {pair}, {name}", rounds, "compiled", "plain", aim=0.7))
    return found


def _loss(aligned: AlignedTeacher, loss: str, batch: dict[str, Tensor], student_kv: Tensor) -> Tensor:
    return kv_loss(parse_kv_loss(loss), aligned.compare(student_kv, batch), 0.0)[0]


def _timed(loss: Callable[[Tensor], Tensor], student_kv: Tensor) -> Callable[[], float]:
    synchronise = torch.cuda.synchronize if student_kv.is_cuda else lambda: None

    def run() -> float:
        synchronise()
        start = time.perf_counter()
        loss(student_kv).backward()
        synchronise()
        student_kv.grad = None
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    size = {"batch_size": 8, "num_tokens": 512} if device.type == "cuda" else {"batch_size": 4, "num_tokens": 128}
    print(HEADER, *(found.row for found in measure(device, **size)), sep="\n")  # noqa: T201
