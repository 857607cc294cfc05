"""How good a student is: on held-out tokens, by the answers it generates, and by its KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.sample import Segment, extract_answer
from ..kvcache.store import KVStore
from .distiller import KVDistiller, at_positions
from .losses import IGNORED, kv_mse, next_token_loss
from .training_data import KVDataset

EVAL_BATCH = 32
GENERATION_BATCH = 128


class LinearCKA:
    """Linear CKA (Kornblith et al., 2019) of two sets of features, streamed over batches of tokens."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: list[Tensor] = []
        self._products: list[Tensor] = []

    def update(self, x: Float[Tensor, "N F"], y: Float[Tensor, "N G"]) -> None:
        """Add N tokens seen from both sides."""
        x, y = x.double(), y.double()
        sums, products = [x.sum(0), y.sum(0)], [x.T @ y, x.T @ x, y.T @ y]
        self._count += len(x)
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._products = [a + b for a, b in zip(self._products, products, strict=True)] if self._products else products

    def value(self) -> float:
        """From 0 (unrelated) to 1 (equal up to rotation and scale)."""
        sx, sy = self._sums
        xy, xx, yy = self._products
        cross = (xy - torch.outer(sx, sy) / self._count).norm().square()
        own_x = (xx - torch.outer(sx, sx) / self._count).norm()
        own_y = (yy - torch.outer(sy, sy) / self._count).norm()
        return float(cross / (own_x * own_y).clamp_min(1e-12))


def token_features(kv: Float[Tensor, "B H T D"], mask: Int[Tensor, "B T"]) -> Float[Tensor, "N F"]:
    """One row of H * D features for every real token."""
    return kv.transpose(1, 2).flatten(2)[mask.bool()]


class KVAgreement:
    """Collects how far the student's cache agrees with the teacher's, key and value apart.

    `cosine` and `nmse` compare prediction and target of the aligner, so they exist with one only;
    `cka` compares the raw caches of mapped layers and needs none.
    """

    def __init__(self, layer_map: Sequence[int]) -> None:
        self._layer_map = layer_map
        self._cka = [[LinearCKA(), LinearCKA()] for _ in layer_map]
        self._tokens = 0.0
        self._sums: dict[str, float] = {}

    def update(
        self,
        distiller: KVDistiller,
        student_kv: Float[Tensor, "Ls 2 B Hs T Ds"],
        teacher_kv: Tensor,
        mask: Int[Tensor, "B T"],
    ) -> None:
        for layer, teacher_layer in enumerate(self._layer_map):
            for kv in range(2):
                self._cka[layer][kv].update(
                    token_features(student_kv[layer, kv], mask), token_features(teacher_kv[teacher_layer, kv], mask)
                )
        if distiller.aligner is None:
            return
        prediction, target = distiller.aligner(student_kv, teacher_kv)
        tokens = float(mask.sum())
        for kv, name in enumerate(("key", "value")):
            p, t = prediction[:, kv : kv + 1], target[:, kv : kv + 1]
            cosine = F.cosine_similarity(p, t, dim=-1) * mask[None, None, :, None, :]
            layers, heads = cosine.shape[0], cosine.shape[3]
            self._add(f"cosine_{name}", float(cosine.sum()) / (layers * heads))
            self._add(f"nmse_{name}", float(kv_mse(p, t, mask)) * tokens)
        self._tokens += tokens

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def metrics(self) -> dict[str, float]:
        found = {name: total / self._tokens for name, total in self._sums.items()}
        for kv, name in enumerate(("key", "value")):
            found[f"cka_{name}"] = sum(layer[kv].value() for layer in self._cka) / len(self._cka)
        return found


@torch.inference_mode()
def evaluate_tokens(
    distiller: KVDistiller, dataset: KVDataset, indices: Sequence[int], layer_map: Sequence[int]
) -> tuple[dict[str, float], list[float]]:
    """Teacher-forced metrics over held-out samples, and the cross-entropy of each sample.

    `ce` (nats a token) and `token_accuracy` are over learned tokens; the rest are KVAgreement's, where the
    dataset carries teacher KV.
    """
    distiller.eval()
    device = distiller.student.device
    agreement = KVAgreement(layer_map)
    loss = correct = count = 0.0
    sample_ce: list[float] = []
    for batch_indices in _chunks(list(indices), EVAL_BATCH):
        batch = {name: tensor.to(device) for name, tensor in dataset.__getitems__(batch_indices).items()}
        logits, student_kv = distiller.student_forward(batch["input_ids"], batch["attention_mask"])
        losses = next_token_loss(logits, batch["labels"], reduction="none")
        learned = batch["labels"][:, 1:] != IGNORED
        hits = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]) & learned
        sample_ce += (losses.sum(1) / learned.sum(1).clamp_min(1)).tolist()
        loss, correct, count = loss + float(losses.sum()), correct + float(hits.sum()), count + float(learned.sum())
        if "teacher_kv" in batch:
            kept, mask = at_positions(student_kv, batch["attention_mask"], batch.get("kv_positions"))
            agreement.update(distiller, kept, batch["teacher_kv"], mask)
    metrics = {"ce": loss / count, "token_accuracy": correct / count}
    if dataset.reader is not None:
        metrics |= agreement.metrics()
    return metrics, sample_ce


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """The greedy continuation of every prompt (token ids), in the order given."""
    texts = [""] * len(prompts)
    # Prompts of one length side by side: less padding to compute.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for chunk in _chunks(order, GENERATION_BATCH):
        for i, text in zip(
            chunk, _continue_greedily(model, tokenizer, [prompts[i] for i in chunk], max_new_tokens), strict=True
        ):
            texts[i] = text
    return texts


@torch.inference_mode()
def _continue_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generation = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad
    )
    with _without_own_defaults(model):
        output = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), generation_config=generation
        )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


@contextmanager
def _without_own_defaults(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills what it is not told from the model's own config: a repetition penalty is not greedy."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def evaluate_answers(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: KVStore,
    indices: Sequence[int],
    max_new_tokens: int,
) -> dict[int, tuple[str, bool]]:
    """For every sample with a prompt and an answer: the generated text, and whether its answer is exact."""
    student.eval()
    chosen, prompts = [], []
    for index in indices:
        ids = store.input_ids[index][store.segment_ids[index] == Segment.PROMPT]
        if len(ids) and store.records[index]["answer"]:
            chosen.append(int(index))
            prompts.append(ids.tolist())
    texts = generate_answers(student, tokenizer, prompts, max_new_tokens)
    return {
        index: (text, extract_answer(text) == store.records[index]["answer"].strip())
        for index, text in zip(chosen, texts, strict=True)
    }


def _chunks(items: list[int], size: int) -> list[list[int]]:
    edges = [*range(0, len(items), size), len(items)]
    return [items[a:b] for a, b in pairwise(edges)]
