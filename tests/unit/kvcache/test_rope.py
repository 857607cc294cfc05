"""Keys with their rotation taken off are what the model's projections gave, and come back when it is put on again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.capture import CaptureCache
from kvpipe.kvcache.errors import ConfigError
from kvpipe.kvcache.layout import stack_past_kv
from kvpipe.kvcache.rope import REQUIRED, RoPE, rope_of
from kvpipe.kvcache.rope_parameters import rope_parameters
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4, "truncate": False},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def scaled(rope_type: str) -> dict[str, Any]:
    """The parameters of one type, as a model's config has them."""
    return {"rope_type": rope_type, "rope_theta": 100.0, **TYPES[rope_type]}


def recorded(rope_type: str = "default", **changes: Any) -> dict[str, Any]:
    """The parameters of one type, as a manifest has them."""
    return {**scaled(rope_type), "max_position_embeddings": 64, "layout": "half", **changes}


CONFIGS: dict[str, PreTrainedConfig] = {
    **{
        f"llama {rope_type}": transformers.LlamaConfig(**SIZES, head_dim=16, rope_parameters=scaled(rope_type))
        for rope_type in TYPES
    },
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=4),
    "phi3": transformers.Phi3Config(**SIZES),
    "phi3 partial": transformers.Phi3Config(**SIZES, partial_rotary_factor=0.5),
    "gpt_neox partial yarn": transformers.GPTNeoXConfig(**SIZES, rope_parameters=scaled("yarn"), rotary_pct=0.5),
    "cohere interleaved": transformers.CohereConfig(**SIZES),
    "glm interleaved partial": transformers.GlmConfig(**SIZES, head_dim=16),
}


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            torch.nn.init.normal_(parameter)
    return model


def unrotated_keys(model: PreTrainedModel, outputs: dict[str, Tensor], head_dim: int) -> Tensor:
    """[L, B, H, T, D], from what the modules that make a layer's keys put out."""
    layers = []
    for layer in range(model.config.num_hidden_layers):
        own = {name.rsplit(".", 1)[-1]: output for name, output in outputs.items() if f".{layer}." in name}
        if "query_key_value" in own:
            keys = own["query_key_value"].unflatten(-1, (-1, 3 * head_dim))[..., head_dim : 2 * head_dim]
        elif "qkv_proj" in own:
            queries, width = model.config.num_attention_heads * head_dim, SIZES["num_key_value_heads"] * head_dim
            keys = own["qkv_proj"][..., queries : queries + width].unflatten(-1, (-1, head_dim))
        else:
            keys = own["k_norm"] if "k_norm" in own else own["k_proj"].unflatten(-1, (-1, head_dim))
        layers.append(keys.transpose(1, 2))
    return torch.stack(layers)


@torch.no_grad()
def keys_of(model: PreTrainedModel, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Captured keys, and the same before their rotation."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.update({name: output})

    makers = ("k_proj", "k_norm", "qkv_proj", "query_key_value")
    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in makers
    ]
    cache = CaptureCache(model.config)
    ids = torch.randint(3, 64, positions.shape, generator=torch.Generator().manual_seed(1))
    model.base_model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    keys = stack_past_kv(cache)[:, 0]
    return keys, unrotated_keys(model, outputs, keys.shape[-1])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_models_keys_without_rotation_are_what_its_projections_gave(name: str) -> None:
    model = random_model(CONFIGS[name])
    positions = torch.stack([torch.arange(20), torch.arange(20) + 40])
    keys, expected = keys_of(model, positions)
    assert (keys - expected).abs().max() > 0.01
    rope = RoPE.from_parameters(json.loads(json.dumps(rope_parameters(model))), keys.shape[-1])
    # The model rounds its cosines to float32.
    torch.testing.assert_close(rope.remove(keys, positions), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(rope.apply(expected, positions), keys, atol=1e-6, rtol=0)


def test_the_yarn_models_scale_their_keys() -> None:
    """Else the test above would not see a scale that is left out."""
    model = random_model(CONFIGS["gpt_neox partial yarn"])
    rope = RoPE.from_parameters(rope_parameters(model), 8)
    assert rope.scale == pytest.approx(0.1 * math.log(4) + 1)
    keys, expected = keys_of(model, torch.zeros(1, 4, dtype=torch.int64))
    torch.testing.assert_close(keys[..., :4], expected[..., :4] * rope.scale, atol=1e-6, rtol=0)
    assert torch.equal(keys[..., 4:], expected[..., 4:])


# ---------------------------------------------------------------------- the rotation itself


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("rope_type", TYPES)
def test_keys_survive_the_round_trip(rope_type: str, share: float, layout: str) -> None:
    rope = RoPE.from_parameters(recorded(rope_type, layout=layout, partial_rotary_factor=share), 16)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 2, 2, 9, 16, generator=generator, dtype=torch.float64)
    positions = torch.randint(0, 64, (2, 9), generator=generator)
    for there_and_back in (
        rope.remove(rope.apply(keys, positions), positions),
        rope.apply(rope.remove(keys, positions), positions),
    ):
        torch.testing.assert_close(there_and_back, keys, atol=1e-12, rtol=0)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_a_rotation_is_what_a_loop_over_complex_numbers_gives(layout: str) -> None:
    rope = RoPE.from_parameters(recorded(layout=layout, partial_rotary_factor=0.5), 12)
    keys = torch.randn(1, 1, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[3, 0, 17, 5, 1]])
    expected = keys.clone()
    for token, position in enumerate(positions[0].tolist()):
        for pair in range(3):
            a, b = (pair, pair + 3) if layout == "half" else (2 * pair, 2 * pair + 1)
            angle = position * 100.0 ** (-2 * pair / 6)
            number = complex(keys[0, 0, token, a], keys[0, 0, token, b]) * complex(math.cos(angle), math.sin(angle))
            expected[0, 0, token, a], expected[0, 0, token, b] = number.real, number.imag
    torch.testing.assert_close(rope.apply(keys, positions), expected, atol=1e-5, rtol=0)


@given(st.sampled_from(sorted(TYPES)), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_products_of_keys_depend_on_their_distance_alone(rope_type: str, a: int, b: int, shift: int) -> None:
    rope = RoPE.from_parameters(recorded(rope_type), 8)
    keys = torch.randn(1, 1, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def product(positions: list[int]) -> Tensor:
        first, second = rope.apply(keys, torch.tensor([positions]))[0, 0]
        return first @ second

    torch.testing.assert_close(product([a, b]), product([a + shift, b + shift]), atol=1e-4, rtol=0)


def test_gradients_pass_through_both_ways() -> None:
    rope = RoPE.from_parameters(recorded("yarn", partial_rotary_factor=0.5), 8)
    keys = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 5, -1]])
    assert torch.autograd.gradcheck(lambda k: rope.apply(k, positions), keys)
    assert torch.autograd.gradcheck(lambda k: rope.remove(k, positions), keys)


def test_padding_stays_as_it_is_and_half_precision_becomes_float32() -> None:
    rope = RoPE.from_parameters(recorded(), 8)
    keys = torch.randn(2, 2, 4, 8).bfloat16()
    removed = rope.remove(keys, torch.tensor([[0, 1, -1, -1], [3, -1, -1, -7]]))
    assert removed.dtype == torch.float32
    assert torch.equal(removed[0, :, 2:], keys[0, :, 2:].float())
    assert torch.equal(removed[1, :, 1:], keys[1, :, 1:].float())
    assert not torch.equal(removed[1, :, 0], keys[1, :, 0].float())


def test_dynamic_is_default_within_the_models_positions() -> None:
    dynamic, default = (RoPE.from_parameters(recorded(name), 8) for name in ("dynamic", "default"))
    assert dynamic == default


# ---------------------------------------------------------------------- what is recorded, and what is refused


def test_parameters_are_json_and_empty_without_rope(tiny_model: PreTrainedModel) -> None:
    parameters = rope_parameters(tiny_model)
    assert json.loads(json.dumps(parameters)) == parameters
    head_dim = getattr(tiny_model.config, "head_dim", None) or 8
    if tiny_model.config.model_type == "gpt2":
        assert parameters == {}
        assert rope_of(parameters, head_dim) is None
    elif tiny_model.config.model_type == "gemma3_text":
        with pytest.raises(ConfigError, match="one rotation for all layers, found one each for sliding_att"):
            rope_of(parameters, head_dim)
    else:
        assert parameters["max_position_embeddings"] == 64
        assert rope_of(parameters, head_dim) == RoPE.from_parameters(parameters, head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_layout_is_found_in_any_precision(name: str, dtype: torch.dtype) -> None:
    layout = "interleaved" if "interleaved" in name else "half"
    assert rope_parameters(random_model(CONFIGS[name], dtype))["layout"] == layout


def test_looking_at_a_model_leaves_it_as_it_was() -> None:
    model = random_model(CONFIGS["qwen3"]).train()
    before = deepcopy(model.state_dict())
    rope_parameters(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
        transformers.Cohere2Config(**SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    ],
    ids=["smollm3", "cohere2"],
)
def test_models_that_rotate_in_some_layers_only_are_refused(config: PreTrainedConfig) -> None:
    parameters = rope_parameters(random_model(config))
    with pytest.raises(ConfigError, match="the same in every layer, found none that fits"):
        RoPE.from_parameters(parameters, 8)


def test_longrope_is_refused() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    longrope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 32, **factors}
    parameters = rope_parameters(random_model(transformers.Phi3Config(**SIZES, rope_parameters=longrope)))
    with pytest.raises(ConfigError, match="one of the types default, linear, dynamic, yarn, llama3, found longrope"):
        RoPE.from_parameters(parameters, 8)


def test_a_rotation_that_no_parameters_tell_of_is_refused() -> None:
    config = transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    with pytest.raises(ConfigError, match="found gptj"):
        rope_of(rope_parameters(random_model(config)), 8)


@pytest.mark.parametrize("rope_type", REQUIRED)
def test_a_missing_number_is_named(rope_type: str) -> None:
    for name in ("rope_theta", *REQUIRED[rope_type]):
        parameters = recorded(rope_type)
        del parameters[name]
        with pytest.raises(ConfigError, match=f"expected {name}, a positive number, found None"):
            RoPE.from_parameters(parameters, 8)


DAMAGE: list[dict[str, Any]] = [
    {"rope_type": None},
    {"rope_type": "spiral"},
    {"rope_type": ["default"]},
    {"rope_theta": "10000"},
    {"rope_theta": True},
    {"rope_theta": -1.0},
    {"rope_theta": 0},
    {"rope_theta": math.nan},
    {"rope_theta": math.inf},
    {"rope_theta": 10**400},
    {"rope_theta": [10000.0]},
    {"partial_rotary_factor": 0.1},
    {"partial_rotary_factor": 2.0},
    {"partial_rotary_factor": 0.4},
    {"partial_rotary_factor": "half"},
    {"layout": "spiral"},
    {"layout": None},
    {"layout": ["half"]},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "rope_theta": 1.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "attention_factor": 0.0},
    {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.25},
]


@pytest.mark.parametrize("change", DAMAGE, ids=str)
def test_damaged_parameters_are_refused_on_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be undone: expected .*, found .*--key-space post-rope") as refusal:
        RoPE.from_parameters(recorded() | change, 8)
    assert "\n" not in str(refusal.value)


NUMBERS = st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.none(), st.booleans(), st.text(max_size=3))


@given(st.sampled_from(sorted(TYPES)), st.data())
def test_any_number_gives_a_rotation_or_a_refusal(rope_type: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in recorded(rope_type) if name not in ("rope_type", "layout")]))
    try:
        rope = RoPE.from_parameters(recorded(rope_type, **{name: data.draw(NUMBERS)}), 8)
    except ConfigError:
        return
    keys = torch.randn(1, 1, 3, 8)
    assert rope.remove(keys, torch.tensor([[0, 1, 2]])).isfinite().all()
