"""The teacher's KV is laid onto the student's layers and tokens, and its keys are rotated as those beside them."""

from __future__ import annotations

import cmath
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.align.layer_map import LayerMap
from kvpipe.kvcache.align.teacher_view import KeySpace, TeacherView
from kvpipe.kvcache.align.time_warp import TimeMap
from kvpipe.kvcache.rope import Layout, RoPE
from torch import Tensor

KEY_SPACES: tuple[KeySpace, ...] = ("post-rope", "pre-rope")

# Powers of two, so that the angles of float32 are exact.
FREQUENCIES = (1.0, 0.125)
TEACHER_ROPE, STUDENT_ROPE = RoPE(FREQUENCIES, "half"), RoPE((0.5,), "interleaved")
LAYERS, HEADS, DIM = 3, 2, 5
MIXED = LayerMap(((0.25, 0.75, 0.0), (0.0, 0.0, 1.0)))


def random_kv(samples: int, tokens: int, seed: int = 0, layers: int = LAYERS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layers, 2, samples, HEADS, tokens, DIM, generator=generator, dtype=torch.float64)


def same_tokens(samples: int, tokens: int) -> TimeMap:
    """The map of a student that reads the teacher's very tokens."""
    index = torch.arange(tokens).expand(samples, -1)[..., None]
    return TimeMap(index, torch.ones(samples, tokens, 1))


def rotated(vector: Tensor, position: int, layout: Layout = "half", sign: int = 1) -> Tensor:
    """One key `[D]` turned to a position, pair by pair, as complex numbers; backwards with a negative sign."""
    turned = vector.clone()
    for pair, frequency in enumerate(FREQUENCIES):
        first, second = (pair, pair + len(FREQUENCIES)) if layout == "half" else (2 * pair, 2 * pair + 1)
        factor = cmath.exp(1j * sign * position * frequency)
        number = complex(vector[first], vector[second]) * factor
        turned[first], turned[second] = number.real, number.imag
    return turned


def loop_view(kv: Tensor, positions: Tensor, time_map: TimeMap, key_space: KeySpace) -> Tensor:
    """What MIXED and a time map make of KV, one vector after the other."""
    samples, tokens, width = time_map.index.shape
    out = torch.zeros(len(MIXED.weights), 2, samples, HEADS, tokens, DIM, dtype=kv.dtype)
    for layer, row in enumerate(MIXED.weights):
        mapped = torch.stack([weight * source for weight, source in zip(row, kv, strict=True)]).sum(0)
        for b in range(samples):
            for t in range(tokens):
                for head in range(HEADS):
                    key, value = torch.zeros(2, DIM, dtype=kv.dtype)
                    for k in range(width):
                        place, weight = int(time_map.index[b, t, k]), float(time_map.weight[b, t, k])
                        key = key + weight * rotated(mapped[0, b, head, place], int(positions[b, place]), sign=-1)
                        value = value + weight * mapped[1, b, head, place]
                    out[layer, 0, b, head, t] = rotated(key, t) if key_space == "post-rope" else key
                    out[layer, 1, b, head, t] = value
    return out


@pytest.mark.parametrize("key_space", KEY_SPACES)
@given(st.data())
def test_the_view_is_that_of_a_loop_over_vectors(key_space: KeySpace, data: st.DataObject) -> None:
    samples, kept, tokens = (data.draw(st.integers(1, largest)) for largest in (2, 5, 6))
    width = data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, kept, (samples, tokens, width), generator=generator)
    weight = torch.randint(0, 3, (samples, tokens, width), generator=generator).double()
    time_map = TimeMap(index, weight / weight.sum(-1, keepdim=True).clamp_min(1))
    positions = torch.randint(0, 40, (samples, kept), generator=generator)
    kv = random_kv(samples, kept, seed)
    found = TeacherView(MIXED, key_space, TEACHER_ROPE, STUDENT_ROPE).teacher(kv, positions, time_map)
    torch.testing.assert_close(found, loop_view(kv, positions, time_map, key_space), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("scale", [1.0, 1.25])
@pytest.mark.parametrize("key_space", KEY_SPACES)
def test_a_map_onto_the_very_same_tokens_changes_nothing(key_space: KeySpace, scale: float, layout: Layout) -> None:
    """The rotation is taken off and put on again, the scale of YaRN with it."""
    kv = random_kv(2, 7)
    view = TeacherView(MIXED, key_space, RoPE(FREQUENCIES, layout, scale))
    torch.testing.assert_close(view.teacher(kv, None, same_tokens(2, 7)), view.teacher(kv), rtol=1e-9, atol=1e-9)


def test_in_the_same_tokens_keys_stay_as_caches_hold_them_to_the_bit() -> None:
    kv = random_kv(2, 4).bfloat16()
    identity = TeacherView(LayerMap.identity(LAYERS), "post-rope", TEACHER_ROPE)
    assert identity.teacher(kv) is kv
    assert torch.equal(replace(identity, layer_map=MIXED).teacher(kv), MIXED.apply(kv))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_before_rope_every_key_is_turned_back_from_where_it_was(layout: Layout) -> None:
    kv = random_kv(2, 3)
    positions = torch.tensor([[4, 0, 9], [2, 7, 1]])
    view = TeacherView(LayerMap.identity(LAYERS), "pre-rope", RoPE(FREQUENCIES, layout))
    found = view.teacher(kv, positions)
    for layer in range(LAYERS):
        for b, head, t in torch.cartesian_prod(torch.arange(2), torch.arange(HEADS), torch.arange(3)).tolist():
            expected = rotated(kv[layer, 0, b, head, t], int(positions[b, t]), layout, sign=-1)
            torch.testing.assert_close(found[layer, 0, b, head, t], expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(found[:, 1], kv[:, 1])


@pytest.mark.parametrize("key_space", KEY_SPACES)
def test_tokens_that_mean_the_same_wherever_they_stand_survive_their_average(key_space: KeySpace) -> None:
    """A mean of rotated keys would not: opposite angles cancel."""
    content = random_kv(1, 1, layers=LAYERS).expand(-1, -1, -1, -1, 8, -1)
    cached = torch.stack([TEACHER_ROPE.apply(content[:, 0], torch.arange(8)[None]), content[:, 1]], dim=1)
    pairs = TimeMap(torch.arange(8).view(1, 4, 2), torch.full((1, 4, 2), 0.5))
    found = TeacherView(LayerMap.identity(LAYERS), key_space, TEACHER_ROPE).teacher(cached, None, pairs)
    expected = cached if key_space == "post-rope" else content
    torch.testing.assert_close(found, expected[..., :4, :], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("key_space", KEY_SPACES)
def test_a_token_without_counterpart_is_zero(key_space: KeySpace) -> None:
    weight = torch.tensor([[[1.0], [0.0], [1.0]]])
    time_map = TimeMap(torch.tensor([[[0], [1], [2]]]), weight)
    found = TeacherView(MIXED, key_space, TEACHER_ROPE).teacher(random_kv(1, 3), None, time_map)
    assert not found[..., 1, :].any()
    assert found[..., [0, 2], :].all()


@pytest.mark.parametrize("key_space", KEY_SPACES)
def test_a_model_without_rotary_embedding_has_nothing_taken_off(key_space: KeySpace) -> None:
    kv, view = random_kv(2, 4), TeacherView(LayerMap.identity(LAYERS), key_space)
    assert torch.equal(view.teacher(kv), kv)
    assert torch.equal(view.student(kv), kv)
    last = TimeMap(torch.full((2, 3, 1), 3), torch.ones(2, 3, 1))
    assert torch.equal(view.teacher(kv, None, last), kv[..., [3, 3, 3], :])


def test_the_students_keys_are_rotated_by_its_own_embedding() -> None:
    own = random_kv(2, 6)
    cached = torch.stack([STUDENT_ROPE.apply(own[:, 0], torch.arange(6).expand(2, -1)), own[:, 1]], dim=1)
    before, after = (TeacherView(MIXED, space, TEACHER_ROPE, STUDENT_ROPE) for space in ("pre-rope", "post-rope"))
    torch.testing.assert_close(before.student(cached), own, rtol=1e-9, atol=1e-9)
    assert after.student(cached) is cached


def test_gradients_pass_the_rotation_of_the_student() -> None:
    kv = random_kv(1, 3, layers=1).requires_grad_()
    view = TeacherView(LayerMap.identity(1), "pre-rope", TEACHER_ROPE, STUDENT_ROPE)
    assert torch.autograd.gradcheck(view.student, (kv,))


def test_gradients_reach_a_warped_teacher() -> None:
    """As they do where its projection is trained."""
    kv = random_kv(1, 3).requires_grad_()
    time_map = TimeMap(torch.tensor([[[0, 1], [2, 2]]]), torch.tensor([[[0.25, 0.75], [1.0, 0.0]]]))
    view = TeacherView(MIXED, "post-rope", TEACHER_ROPE)
    assert torch.autograd.gradcheck(lambda x: view.teacher(x, None, time_map), (kv,))
