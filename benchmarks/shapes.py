"""Architectures that the benchmarks give random weights: the sizes are real, the numbers need not be."""

from __future__ import annotations

from transformers import Qwen2Config

QWEN_05B = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)

QWEN_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)

SMALLER = Qwen2Config(
    vocab_size=151936,
    hidden_size=448,
    intermediate_size=2432,
    num_hidden_layers=12,
    num_attention_heads=7,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)
"""Half the depth and width of the 0.5B."""
