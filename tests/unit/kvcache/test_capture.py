"""Captured KV is what a plain DynamicCache holds, for every architecture; what cannot be captured is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from kvpipe.kvcache.capture import CaptureCache, check_capturable
from kvpipe.kvcache.errors import ModelError
from kvpipe.kvcache.layout import stack_past_kv
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

LENGTHS = [11, 5, 8]
KV_PROJECTIONS = ("k_proj.weight", "v_proj.weight", "c_attn.weight", "qkv_proj.weight", "query_key_value.weight")


def token_ids(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def captured(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    cache = CaptureCache(model.config)
    model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
    cache.check_complete()
    return stack_past_kv(cache)


def padded_batch() -> tuple[Tensor, Tensor]:
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long()
    return token_ids(len(LENGTHS)) * mask, mask


@torch.inference_mode()
def test_kv_and_outputs_equal_those_of_a_dynamic_cache(tiny_model: PreTrainedModel) -> None:
    capture, dynamic = CaptureCache(tiny_model.config), DynamicCache()
    ours = tiny_model(token_ids(), past_key_values=capture, output_hidden_states=True)
    theirs = tiny_model(token_ids(), past_key_values=dynamic, output_hidden_states=True)
    capture.check_complete()
    assert torch.equal(stack_past_kv(capture), stack_past_kv(dynamic))
    assert torch.equal(ours.logits, theirs.logits)
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))


@torch.inference_mode()
def test_the_shape_is_layers_kv_batch_kv_heads_tokens_channels(tiny_model: PreTrainedModel) -> None:
    config = tiny_model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert captured(tiny_model, token_ids()).shape == (3, 2, 2, heads, 11, head_dim)


@torch.inference_mode()
def test_a_padding_mask_changes_nothing_against_a_dynamic_cache(tiny_model: PreTrainedModel) -> None:
    tiny_model.float()  # eager attention takes its softmax in float32, where a float64 mask is -inf
    ids, mask = padded_batch()
    capture, dynamic = CaptureCache(tiny_model.config), DynamicCache()
    ours = tiny_model(ids, attention_mask=mask, past_key_values=capture)
    theirs = tiny_model(ids, attention_mask=mask, past_key_values=dynamic)
    assert torch.equal(stack_past_kv(capture), stack_past_kv(dynamic))
    assert torch.equal(ours.logits, theirs.logits)


@torch.inference_mode()
def test_right_padding_leaves_real_positions_alone(tiny_model: PreTrainedModel) -> None:
    model = tiny_model.float()
    ids, mask = padded_batch()
    batched = captured(model, ids, mask)
    for row, length in enumerate(LENGTHS):
        alone = captured(model, ids[row : row + 1, :length])
        torch.testing.assert_close(batched[:, :, row, :, :length], alone[:, :, 0], atol=1e-5, rtol=0)


def test_sliding_layers_keep_every_token(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model("mistral")
    cropping = DynamicCache(config=model.config)
    model(token_ids(), past_key_values=cropping)
    assert cropping.layers[0].keys.shape[2] < 11
    assert captured(model, token_ids()).shape[4] == 11


def test_a_sliding_window_is_applied(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    """Else the tests of sliding-window models would test full attention twice."""
    model = make_tiny_model("gemma3", torch.float64)
    changed = token_ids()
    changed[:, 0] += 1
    difference = (captured(model, token_ids()) - captured(model, changed)).abs()
    # Layer 0 is local: in layer 1, token 4 and later have not seen token 0.
    assert difference[1, :, :, :, 3].max() > 1e-6
    assert difference[1, :, :, :, 4:].max() == 0
    # Layer 1 is global: in layer 2 they all have.
    assert difference[2, :, :, :, 4:].amax((0, 1, 2, 4)).min() > 1e-6


def kv_projections(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith(KV_PROJECTIONS)}


def test_gradients_reach_the_kv_projections_as_through_a_dynamic_cache(tiny_model: PreTrainedModel) -> None:
    projections = kv_projections(tiny_model)
    assert len({name.split(".")[2] for name in projections}) == 3  # every layer has some
    dynamic = DynamicCache()
    tiny_model(token_ids(), past_key_values=dynamic)
    expected = torch.autograd.grad(stack_past_kv(dynamic).square().sum(), list(projections.values()))
    found = torch.autograd.grad(captured(tiny_model, token_ids()).square().sum(), list(projections.values()))
    for gradient, reference in zip(found, expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, reference, atol=1e-12, rtol=1e-12)


def test_gradients_equal_finite_differences(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model("gpt2", torch.float64)  # the one without RMSNorm, which rounds to float32
    parameters = list(kv_projections(model).values())
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def loss() -> Tensor:
        return captured(model, token_ids()).square().mean()

    @torch.no_grad()
    def move(step: float) -> None:
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter += step * direction

    gradients = torch.autograd.grad(loss(), parameters)
    analytic = torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()
    move(1e-5)
    above = loss().detach()
    move(-2e-5)
    numeric = (above - loss().detach()) / 2e-5
    torch.testing.assert_close(analytic, numeric, rtol=1e-5, atol=1e-8)


def test_the_captured_tensors_are_not_copies(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    cache = CaptureCache(make_tiny_model("llama").config)
    key, value = torch.randn(2, 1, 2, 4, 8).unbind()
    returned = cache.update(key, value, 0)
    assert returned[0] is key
    assert returned[1] is value
    assert cache.layers[0].keys is key
    assert cache.layers[0].values is value


def test_a_second_forward_replaces_the_first(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model("qwen3")
    cache = CaptureCache(model.config)
    with torch.inference_mode():
        model(token_ids(2, 7), past_key_values=cache)
        model(token_ids(), past_key_values=cache)
        assert torch.equal(stack_past_kv(cache), captured(model, token_ids()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_is_refused(tiny_model: PreTrainedModel, use_reentrant: bool) -> None:
    tiny_model.train()
    enable = getattr(tiny_model, "activation_checkpointing_enable", tiny_model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    with pytest.raises(ModelError, match=r"expected 3 layers, found 0\. Turn gradient checkpointing off"):
        captured(tiny_model, token_ids())
    # It is off in eval mode.
    assert captured(tiny_model.eval(), token_ids()).shape[0] == 3


def test_an_unused_cache_is_incomplete(tiny_config: PreTrainedConfig) -> None:
    with pytest.raises(ModelError, match="expected 3 layers, found 0"):
        CaptureCache(tiny_config).check_complete()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (transformers.Qwen3NextConfig(num_hidden_layers=4), "linear_attention"),
        (transformers.JambaConfig(), "linear_attention"),
        (transformers.MambaConfig(), "linear_attention"),
        (transformers.Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), "conv"),
        (transformers.DeepseekV3Config(num_hidden_layers=2), "latent attention (MLA)"),
        (transformers.Gemma3nTextConfig(), "shared-KV layers"),
        (transformers.Gemma3nConfig(), "shared-KV layers"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreTrainedConfig) else "",
)
def test_layers_without_a_plain_kv_cache_are_refused_by_name(config: PreTrainedConfig, named: str) -> None:
    with pytest.raises(ModelError) as refusal:
        CaptureCache(config)
    assert str(refusal.value).startswith(f"{config.model_type} has layers without a plain KV cache")
    assert f"found {named}" in str(refusal.value)


def test_every_architecture_under_test_is_capturable(tiny_config: PreTrainedConfig) -> None:
    assert check_capturable(tiny_config) is None
