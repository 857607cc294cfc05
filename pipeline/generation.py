"""Models continue prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

GENERATION_BATCH = 128


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """The greedy continuation of every prompt (token ids), in the order given."""
    texts = [""] * len(prompts)
    # Prompts of one length side by side: less padding to compute.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for chunk in chunks(order, GENERATION_BATCH):
        for i, text in zip(
            chunk, continue_batch(model, tokenizer, [prompts[i] for i in chunk], max_new_tokens), strict=True
        ):
            texts[i] = text
    return texts


@torch.inference_mode()
def continue_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[str]:
    """One batch: greedy, or sampled at a temperature."""
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad, **sampling
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


def chunks(items: list[int], size: int) -> list[list[int]]:
    """Runs of `size` items, the last one shorter."""
    edges = [*range(0, len(items), size), len(items)]
    return [items[a:b] for a, b in pairwise(edges)]
