"""Students that start from a configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kvpipe.kvcache.errors import ModelError
from kvpipe.pipeline.models import load_student
from transformers import PreTrainedTokenizerFast, Qwen2Config

SOUND = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def written(folder: Path, **options: Any) -> str:
    config = Qwen2Config(**SOUND | {"num_key_value_heads": 2, "vocab_size": 64})
    for name, value in options.items():
        setattr(config, name, value)
    path = folder / "config.json"
    config.to_json_file(path)
    return str(path)


def test_a_trial_forward_leaves_the_student_as_it_was(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    student = load_student(written(tmp_path, attention_dropout=0.5), tokenizer, random_init=True, seed=3)
    assert student.training
    drawn = torch.rand(1)
    load_student(written(tmp_path), tokenizer, random_init=True, seed=3)
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.parametrize("heads", [{"num_attention_heads": 5, "num_key_value_heads": 3}, {"num_key_value_heads": 3}])
def test_a_student_of_shapes_that_do_not_go_together_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, heads: dict[str, int]
) -> None:
    """An odd head_dim under rotary embedding, and query heads that share no whole number of KV heads."""
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        load_student(written(tmp_path, **heads), tokenizer, random_init=True, seed=0)
    assert str(caught.value).endswith("Mend --student")
