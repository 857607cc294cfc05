"""Only models whose tokens see nothing but the ones before them can teach or learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kvpipe.kvcache.errors import ModelError
from kvpipe.pipeline.models import load_student, load_teacher, load_tokenizer, require_causal
from transformers import AutoModelForCausalLM, BertConfig, PreTrainedModel


def test_every_architecture_under_test_is_causal(tiny_model: PreTrainedModel) -> None:
    tiny_model.train()
    require_causal(tiny_model, "--model")
    assert tiny_model.training


@pytest.fixture
def bidirectional(tmp_path: Path) -> Path:
    """A BERT that AutoModelForCausalLM takes without a word."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bert")
    load_tokenizer("qwen").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_bidirectional_model_is_refused_on_either_side(bidirectional: Path) -> None:
    with pytest.raises(ModelError, match=r"bert is not a causal language model.*--model"):
        load_teacher(str(bidirectional), dtype="auto", device=torch.device("cpu"))
    tokenizer = load_tokenizer("qwen")
    for random_init in (False, True):
        with pytest.raises(ModelError, match=r"bert is not a causal language model.*--student"):
            load_student(str(bidirectional), tokenizer, random_init=random_init, seed=0)


def test_a_folder_without_weights_is_no_random_student(tmp_path: Path) -> None:
    """Half a download must not become a baseline; its config.json alone, named as such, may."""
    config = Path(str(tmp_path / "half"))
    config.mkdir()
    BertConfig(is_decoder=True, hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(config)
    with pytest.raises(ModelError, match=r"cannot load the student .*half.*Mend --student"):
        load_student(str(config), load_tokenizer("qwen"), random_init=False, seed=0)
    assert load_student(str(config / "config.json"), load_tokenizer("qwen"), random_init=False, seed=0) is not None
