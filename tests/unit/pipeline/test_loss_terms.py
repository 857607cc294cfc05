"""KV losses by their names: what is understood, what is refused, and what no loss may depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpipe.kvcache.errors import ConfigError
from kvpipe.pipeline.kv_losses import kv_cka, kv_kava, kv_smooth_l1
from kvpipe.pipeline.loss_terms import (
    ALIGNED,
    RAW,
    KVBatch,
    LossTerm,
    kv_loss,
    needs_aligner,
    needs_queries,
    parse_kv_loss,
)
from kvpipe.pipeline.losses import kv_mse
from torch import Tensor

NAMES = [
    "mse",
    "smooth-l1",
    "mercator",
    "magnitude",
    "hybrid",
    "kava",
    "structural",
    "attention-mse",
    "relation",
    "cka",
]

# Padding at the end, and tokens in the middle that do not count.
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]])


def kv_batch(seed: int = 0) -> KVBatch:
    """Sides of other heads and channels: 2 query heads on 1 KV head of 3 channels, 4 on 2 of 4."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 2, 3, 2, 5, 4)] * 2 + [(2, 2, 3, 1, 5, 3), (2, 2, 3, 2, 5, 4), (2, 3, 2, 5, 3), (2, 3, 4, 5, 4)]
    parts = [torch.randn(shape, generator=generator) for shape in shapes]
    return KVBatch(*parts[:4], MASK, *parts[4:])


def changed(batch: KVBatch, change: Callable[[Tensor], Tensor], mask: Tensor = MASK) -> KVBatch:
    """The same change to every tensor, and perhaps another mask."""
    names = [f.name for f in fields(batch) if f.name != "mask" and getattr(batch, f.name) is not None]
    return replace(batch, mask=mask, **{name: change(getattr(batch, name)) for name in names})


def gradients(batch: KVBatch) -> list[Tensor]:
    """Of what belongs to the student, where there are any."""
    sides = (batch.prediction, batch.student_kv, batch.student_queries)
    return [side.grad for side in sides if side is not None and side.grad is not None]


def loss_of(name: str, batch: KVBatch) -> Tensor:
    return kv_loss([LossTerm(name)], batch, 1.0)[0]


every_loss = pytest.mark.parametrize("name", NAMES)


def test_all_losses_have_a_name_and_lie_on_one_side() -> None:
    assert list(ALIGNED | RAW) == NAMES
    assert not ALIGNED.keys() & RAW.keys()


@every_loss
def test_tokens_that_do_not_count_have_no_influence_and_get_no_gradient(name: str) -> None:
    batch = kv_batch()
    uncounted = (MASK == 0)[:, None, :, None]
    noisy = changed(batch, lambda side: side.masked_fill(uncounted, 1e4).requires_grad_())
    loss = loss_of(name, noisy)
    torch.testing.assert_close(loss, loss_of(name, batch))
    loss.backward()
    assert gradients(noisy)
    for gradient in gradients(noisy):
        assert gradient.isfinite().all()
        assert not gradient.masked_select(uncounted).any()
        assert gradient.any()


@every_loss
@settings(max_examples=8)
@given(extra=st.integers(1, 9), order=st.permutations(range(3)), seed=st.integers(0, 50))
def test_more_padding_and_another_order_change_nothing(name: str, extra: int, order: list[int], seed: int) -> None:
    batch = kv_batch(seed)

    def moved(side: Tensor) -> Tensor:
        filler = torch.full((*side.shape[:-2], extra, side.shape[-1]), 9.0)
        return torch.cat([side, filler], dim=-2)[..., order, :, :, :]

    mask = torch.cat([MASK, torch.zeros(3, extra, dtype=MASK.dtype)], dim=1)[order]
    torch.testing.assert_close(loss_of(name, changed(batch, moved, mask)), loss_of(name, batch))


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_nothing_but_the_rounding_of_the_inputs(name: str, dtype: torch.dtype) -> None:
    half = changed(kv_batch(), lambda side: side.to(dtype))
    expected = loss_of(name, changed(half, Tensor.float))
    # The squared error of two sides in half precision has its digits; one side in float32 is enough to have more.
    digits = {"rtol": 1e-2, "atol": 0, "check_dtype": False} if name == "mse" else {}
    torch.testing.assert_close(loss_of(name, half), expected, **digits)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss_of(name, half), expected, **digits)


@every_loss
def test_a_batch_in_which_no_token_counts_has_a_finite_loss_and_no_gradient(name: str) -> None:
    batch = changed(kv_batch(), Tensor.requires_grad_, torch.zeros_like(MASK))
    loss = loss_of(name, batch)
    loss.backward()
    assert loss.isfinite()
    for gradient in gradients(batch):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@every_loss
def test_a_sample_in_which_no_token_counts_might_as_well_be_missing(name: str) -> None:
    mask = MASK * torch.tensor([[1], [0], [1]])
    batch = changed(kv_batch(), Tensor.requires_grad_, mask)
    loss = loss_of(name, batch)
    rest = changed(kv_batch(), lambda side: side[..., [0, 2], :, :, :], mask[[0, 2]])
    torch.testing.assert_close(loss, loss_of(name, rest))
    loss.backward()
    for gradient in gradients(batch):
        assert gradient.isfinite().all()
        assert not gradient[..., 1, :, :, :].any()


@every_loss
def test_one_token_counts_as_if_it_were_alone(name: str) -> None:
    alone = changed(kv_batch(), lambda side: side[..., :1, :, :1, :].clone().requires_grad_(), MASK[:1, :1])
    loss = loss_of(name, alone)
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(alone))
    among_others = torch.zeros_like(MASK)
    among_others[0, 0] = 1
    torch.testing.assert_close(loss, loss_of(name, changed(kv_batch(), Tensor.clone, among_others)))
    # It has no relation but to itself, does not vary, and gets all the attention there is.
    known = {"relation": 0, "cka": 1, "attention-mse": kv_mse(*alone.aligned).item()}
    assert loss.item() == pytest.approx(known.get(name, loss.item()))


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("mse", [LossTerm("mse")]),
        ("smooth-l1", [LossTerm("smooth-l1")]),
        ("mse,cka:0.1", [LossTerm("mse"), LossTerm("cka", 0.1)]),
        ("mse:1:0.2,relation:0.5", [LossTerm("mse", 1.0, 0.2), LossTerm("relation", 0.5)]),
        (" mse : 2 , kava : 0 : 1 ", [LossTerm("mse", 2.0), LossTerm("kava", 0.0, 1.0)]),
    ],
)
def test_a_loss_is_a_sum_of_named_terms(text: str, terms: list[LossTerm]) -> None:
    assert parse_kv_loss(text) == tuple(terms)


@given(
    st.lists(
        st.builds(LossTerm, st.sampled_from(NAMES), st.floats(1e-6, 1e6), st.floats(0, 1)),
        min_size=1,
        unique_by=lambda term: term.name,
    )
)
def test_what_is_written_out_in_full_is_read_back(terms: list[LossTerm]) -> None:
    text = ",".join(f"{term.name}:{term.weight!r}:{term.warmup!r}" for term in terms)
    assert parse_kv_loss(text) == tuple(terms)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mae", f"expected some of {', '.join(NAMES)}, found 'mae'"),
        ("", "found ''"),
        ("mse,", "found ''"),
        ("MSE", "found 'MSE'"),
        ("ms\ne", r"found 'ms\ne'"),
        ("mse:much", "expected name, name:weight or name:weight:warm-up, found 'mse:much'"),
        ("mse:", "expected name, name:weight or name:weight:warm-up"),
        ("mse:1:0:0", "expected name, name:weight or name:weight:warm-up"),
        ("mse:-1", "expected a weight of 0 or more"),
        ("mse:nan", "expected a weight of 0 or more"),
        ("mse:inf", "expected a weight of 0 or more"),
        ("mse:1:1.5", "expected a warm-up from 0 to 1"),
        ("mse:1:-0.1", "expected a warm-up from 0 to 1"),
        ("mse:1:nan", "expected a warm-up from 0 to 1"),
        ("mse,cka,mse:2", "expected every term once"),
        ("mse:0,cka:0", "expected a term with a weight above 0"),
    ],
)
def test_what_makes_no_loss_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_kv_loss(text)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@given(st.text(alphabet="mseck:,.019-+einfa \n\u2028"))
def test_any_text_is_either_a_loss_or_one_line_of_refusal(text: str) -> None:
    message = "one line"
    try:
        assert {term.name for term in parse_kv_loss(text)} <= set(NAMES)
    except ConfigError as error:
        message = str(error)
    assert len(message.splitlines()) == 1


def test_a_warm_up_grows_from_nothing_over_its_share_of_the_run() -> None:
    term = LossTerm("mse", 2.0, 0.2)
    assert [term.weight_at(progress) for progress in (0.0, 0.05, 0.1, 0.2, 0.7, 1.0)] == [0.0, 0.5, 1.0, 2.0, 2.0, 2.0]
    assert LossTerm("mse", 2.0).weight_at(0.0) == 2.0


def test_what_a_loss_needs_is_known_beforehand() -> None:
    assert {name for name in NAMES if not needs_aligner([LossTerm(name)])} == {"relation", "cka"}
    assert {name for name in NAMES if needs_queries([LossTerm(name)])} == {"structural", "attention-mse"}
    assert needs_aligner(parse_kv_loss("relation,mse:0.1"))
    assert needs_queries(parse_kv_loss("mse,structural:0.1"))


@every_loss
def test_a_loss_asks_for_no_more_than_it_says(name: str) -> None:
    batch, terms = kv_batch(), [LossTerm(name)]
    if not needs_aligner(terms):
        batch = replace(batch, prediction=None, target=None)
    if not needs_queries(terms):
        batch = replace(batch, student_queries=None, teacher_queries=None)
    assert torch.equal(loss_of(name, batch), loss_of(name, kv_batch()))


def test_names_stand_for_their_functions() -> None:
    batch = kv_batch()
    assert torch.equal(loss_of("mse", batch), kv_mse(*batch.aligned))
    assert torch.equal(loss_of("smooth-l1", batch), kv_smooth_l1(*batch.aligned))
    assert torch.equal(loss_of("kava", batch), kv_kava(*batch.aligned))
    assert torch.equal(loss_of("cka", batch), kv_cka(batch.student_kv, batch.teacher_kv, batch.mask))


def test_the_total_is_the_weighted_sum_of_what_each_term_says() -> None:
    batch = changed(kv_batch(), Tensor.requires_grad_)
    total, parts = kv_loss(parse_kv_loss("mse:3,cka:0.5:0.4,relation:2:0.1"), batch, 0.1)
    assert list(parts) == ["mse", "cka", "relation"]
    assert not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(total.detach(), 3 * parts["mse"] + 0.125 * parts["cka"] + 2 * parts["relation"])
    for name, part in parts.items():
        assert torch.equal(part, loss_of(name, batch).detach())
    total.backward()
    assert len(gradients(batch)) == 2


def test_a_term_that_has_not_begun_to_warm_up_is_reported_but_teaches_nothing() -> None:
    batch = changed(kv_batch(), Tensor.requires_grad_)
    total, parts = kv_loss(parse_kv_loss("mse,cka:1:0.5"), batch, 0.0)
    total.backward()
    assert parts["cka"] > 0
    assert batch.student_kv.grad is not None
    assert not batch.student_kv.grad.any()
    assert torch.equal(total.detach(), parts["mse"])
