"""What the built-in teachers are: architecture, tokenizer, and the text that each learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..data.corpus import BUILTIN_DATASET
from ..data.sample import Sample

EOS = "<|endoftext|>"
PAD = "<|pad|>"


@dataclass(frozen=True)
class TeacherRecipe:
    """A teacher but for its weights. They differ in all that a student has to be aligned to: depth, heads, channels,
    positions, tokens, and what they say for one prompt.

    `single_digits` writes every digit as a token of its own, else numbers are cut like words; `bos` is the token that
    begins every text, if one does. `shape` is what its configuration says beside vocabulary and special tokens.
    """

    model_type: str
    dataset: str
    vocabulary: int
    single_digits: bool
    bos: str | None
    max_tokens: int
    shape: dict[str, Any]


RECIPES = {
    "qwen": TeacherRecipe(
        model_type="qwen3",
        dataset=BUILTIN_DATASET,
        vocabulary=512,
        single_digits=True,
        bos=None,
        max_tokens=2048,
        shape={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
    "llama": TeacherRecipe(
        model_type="llama",
        dataset=BUILTIN_DATASET,
        vocabulary=1024,
        single_digits=False,
        bos="<|begin_of_text|>",
        max_tokens=2048,
        shape={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_theta": 500_000.0,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": TeacherRecipe(
        model_type="gpt2",
        dataset="word-problems-long",
        vocabulary=384,
        single_digits=True,
        bos=None,
        max_tokens=512,
        shape={
            "n_embd": 128,
            "n_inner": 384,
            "n_layer": 5,
            "n_head": 8,
            "n_positions": 512,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
}


def train_tokenizer(samples: Sequence[Sample], recipe: TeacherRecipe = RECIPES["qwen"]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as the recipe cuts numbers and begins texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=recipe.single_digits),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    # A token's characters include its leading space, so that the spans cover the text without gaps.
    whole_spans = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[EOS, PAD, *([recipe.bos] if recipe.bos else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((sample.text for sample in samples), trainer)
    bpe.post_processor = whole_spans if recipe.bos is None else _then_begin(whole_spans, recipe.bos, bpe)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=recipe.bos,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=recipe.max_tokens,
        clean_up_tokenization_spaces=False,
    )


def _then_begin(first: Any, bos: str, bpe: Tokenizer) -> Any:
    begin = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    return processors.Sequence([first, begin])


def new_model(tokenizer: PreTrainedTokenizerBase, recipe: TeacherRecipe = RECIPES["qwen"]) -> PreTrainedModel:
    """The teacher's architecture with random weights."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(recipe.model_type, vocab_size=len(tokenizer), **special, **recipe.shape)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model
