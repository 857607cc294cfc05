"""Generation in batches against generation one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from kvpipe.pipeline import generation
from kvpipe.pipeline.generation import continue_batch, generate_texts
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

MakeModel = Callable[..., PreTrainedModel]


def one_by_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """`model.generate` on each prompt alone: no padding, no batch."""
    plain = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=1, pad_token_id=0)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
        texts.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    return texts


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 40, rng.integers(1, 15)).tolist() for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 4, 128])
def test_batched_generation_is_generation_one_by_one(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    monkeypatch.setattr(generation, "GENERATION_BATCH", batch_size)
    model, prompts = make_model(), random_prompts(9)
    found = generate_texts(model, tokenizer, prompts, 6)
    assert found == one_by_one(model, tokenizer, prompts, 6)
    assert len(set(found)) > 4


def test_answers_keep_the_order_of_their_prompts(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model, prompts = make_model(), random_prompts(8)
    found = generate_texts(model, tokenizer, prompts, 5)
    assert generate_texts(model, tokenizer, prompts[::-1], 5) == found[::-1]
    assert generate_texts(model, tokenizer, [], 5) == []


def test_a_models_own_generation_settings_do_not_leak_in(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = random_prompts(6)
    expected = generate_texts(make_model(), tokenizer, prompts, 12)
    model = make_model()
    model.generation_config = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=3)
    assert generate_texts(model, tokenizer, prompts, 12) == expected


def test_samples_depend_on_the_random_state_and_the_temperature(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, prompts = make_model(), random_prompts(8)

    def sampled(seed: int, temperature: float) -> list[str]:
        torch.manual_seed(seed)
        return continue_batch(model, tokenizer, prompts, 6, temperature)

    assert sampled(0, 1.0) == sampled(0, 1.0)
    assert sampled(0, 1.0) != sampled(1, 1.0)
    # Next to no temperature leaves the likeliest token alone.
    assert sampled(0, 1e-4) == generate_texts(model, tokenizer, prompts, 6)
