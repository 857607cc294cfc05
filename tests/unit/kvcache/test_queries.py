"""The queries that attention used, and an attention that is none the wiser."""

from __future__ import annotations

import pytest
import torch
from kvpipe.kvcache.capture import CaptureCache
from kvpipe.kvcache.errors import ModelError
from kvpipe.kvcache.layout import layer_pairs, take_tokens
from kvpipe.kvcache.queries import recorded_queries
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedModel


def test_recorded_queries_give_the_attention_of_every_layer(tiny_model: PreTrainedModel) -> None:
    """Softmax of query and key, times the values, is what the attention put out."""
    outputs: list[torch.Tensor] = []

    def keep(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        outputs.append(inputs[0])

    names = ("o_proj", "c_proj", "dense")
    projections = [
        module
        for name, module in tiny_model.named_modules()
        if name.rsplit(".", 1)[-1] in names and "attn" in name.replace("attention", "attn") and "mlp" not in name
    ]
    assert len(projections) == 3
    hooks = [module.register_forward_pre_hook(keep) for module in projections]
    ids, places = torch.arange(1, 13)[None].repeat(2, 1), torch.tensor([[0, 3], [11, -1]])
    cache = CaptureCache(tiny_model.config)
    with torch.no_grad(), recorded_queries(tiny_model, places) as queries:
        tiny_model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    assert len(queries) == 3
    softcap = getattr(tiny_model.config, "attn_logit_softcapping", None)
    windows = getattr(tiny_model.config, "sliding_window", None)
    for query, (key, value), output in zip(queries.values(), layer_pairs(cache), outputs, strict=True):
        groups = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(groups, 1).transpose(-1, -2)
        if softcap is not None:
            continue
        allowed = torch.arange(12) <= places.clamp_min(0)[:, None, :, None]
        candidates = [logits.masked_fill(~allowed, -torch.inf)]
        if windows:
            near = torch.arange(12) > places.clamp_min(0)[:, None, :, None] - windows
            candidates.append(logits.masked_fill(~(allowed & near), -torch.inf))
        expected = take_tokens(output.unflatten(-1, (query.shape[1], -1)).transpose(1, 2), places)
        mixed = [weights.softmax(-1) @ value.repeat_interleave(groups, 1) for weights in candidates]
        assert any(torch.allclose(found, expected, atol=1e-9) for found in mixed)


def test_all_queries_of_some_layers_are_those_at_every_place(tiny_model: PreTrainedModel) -> None:
    ids, found = torch.arange(1, 13)[None].repeat(2, 1), []
    everywhere = torch.arange(12)[None].repeat(2, 1)
    for places, layers in ((everywhere, None), (None, None), (None, [0, 2])):
        with torch.no_grad(), recorded_queries(tiny_model, places, layers) as queries:
            tiny_model.base_model(input_ids=ids)
        found.append(queries)
    assert [sorted(queries) for queries in found] == [[0, 1, 2], [0, 1, 2], [0, 2]]
    for queries in found[1:]:
        for layer, query in queries.items():
            assert torch.equal(query, found[0][layer])


def test_a_model_with_an_attention_of_its_own_is_refused() -> None:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
    model = GPTJForCausalLM(GPTJConfig(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    says = r"cannot be seen: expected the attention of transformers in 2 layers, found 0\..* --queries, .*--evict"
    with pytest.raises(ModelError, match=says), torch.no_grad(), recorded_queries(model):
        model.base_model(input_ids=torch.arange(1, 5)[None])


def test_recording_changes_no_bit_and_ends_with_the_context(tiny_model: PreTrainedModel) -> None:
    ids = torch.arange(1, 13)[None]
    own = tiny_model.config._attn_implementation

    def captured() -> list[torch.Tensor]:
        cache = CaptureCache(tiny_model.config)
        with torch.no_grad():
            tiny_model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        return [tensor for pair in layer_pairs(cache) for tensor in pair]

    before = captured()
    with recorded_queries(tiny_model, torch.tensor([[0]])) as queries:
        during = captured()
    assert len(queries) == 3
    after = captured()
    assert len(queries) == 3
    assert tiny_model.config._attn_implementation == own
    for a, b, c in zip(before, during, after, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
