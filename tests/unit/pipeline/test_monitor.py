"""The health of a distillation target, and when a run counts as collapsed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kvpipe.kvcache.errors import CollapseError
from kvpipe.pipeline.monitor import (
    ABSORBED_SHARE,
    COLLAPSE_RATIO,
    CollapseMonitor,
    effective_rank,
    gradient_share,
    target_health,
)
from torch import Tensor, nn

SHAPE = (2, 2, 3, 2, 10, 4)  # [L, 2, B, H, T, D]
MASK = torch.tensor([[1] * 10, [1] * 6 + [0] * 4, [1] * 3 + [0] * 7])


def random_target(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def rank_of(rows: Tensor) -> float:
    return effective_rank(rows.double().T @ rows.double())


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_identity_has_full_rank(size: int) -> None:
    assert rank_of(torch.eye(size)) == pytest.approx(size, rel=1e-5)


def test_an_orthogonal_basis_has_full_rank_whatever_its_scale() -> None:
    basis, _ = torch.linalg.qr(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))
    assert rank_of(basis) == pytest.approx(6, rel=1e-4)
    assert rank_of(1e-3 * basis) == pytest.approx(6, rel=1e-4)


def test_a_single_direction_has_rank_one() -> None:
    generator = torch.Generator().manual_seed(0)
    assert rank_of(torch.outer(torch.randn(30, generator=generator), torch.randn(8, generator=generator))) < 1.01
    assert rank_of(torch.zeros(5, 3)) == pytest.approx(1)


def test_rank_is_the_exponential_of_the_entropy_of_singular_values() -> None:
    entropy = -sum(share * math.log(share) for share in (0.5, 0.3, 0.2))
    assert rank_of(torch.diag(torch.tensor([5.0, 3.0, 2.0]))) == pytest.approx(math.exp(entropy), rel=1e-5)


def test_health_is_over_real_tokens_and_averaged_over_layers_and_kinds() -> None:
    target = random_target()
    target[..., 0] *= 3
    variances, ranks = [], []
    for layer in range(SHAPE[0]):
        for kind in range(2):
            rows = [target[layer, kind, b, :, t].flatten() for b in range(3) for t in range(10) if MASK[b, t]]
            tokens = torch.stack(rows).double()
            variances.append(tokens.var(0, correction=0).mean())
            ranks.append(rank_of((tokens - tokens.mean(0)).float()))
    health = target_health(target, MASK)
    assert health.variance == pytest.approx(float(torch.stack(variances).mean()), rel=1e-5)
    assert health.effective_rank == pytest.approx(sum(ranks) / 4, rel=1e-5)


def test_padding_does_not_touch_the_health() -> None:
    target = random_target()
    noisy = target.masked_fill(~MASK.bool()[None, None, :, None, :, None], 1e5)
    assert target_health(noisy, MASK) == target_health(target, MASK)


def test_a_shift_of_all_tokens_does_not_hide_a_collapse() -> None:
    target = random_target()
    moved = target_health(1e-3 * target + 50, MASK)
    assert moved.variance == pytest.approx(1e-6 * target_health(target, MASK).variance, rel=0.05)


@pytest.mark.parametrize("share", [1.5, 1.05])
def test_a_target_that_keeps_enough_variance_is_no_collapse(share: float) -> None:
    monitor = CollapseMonitor()
    monitor.update(random_target(), MASK)
    monitor.update(math.sqrt(share * COLLAPSE_RATIO) * random_target(), MASK)
    assert not monitor.collapsed


def test_a_shrinking_target_is_a_collapse_and_says_so() -> None:
    monitor = CollapseMonitor()
    seen = []
    for step in range(8):
        monitor.update(0.8**step * random_target(), MASK)
        seen.append(monitor.collapsed)
    # 0.8 ** (2 * 5) is 0.107, 0.8 ** (2 * 6) is 0.069.
    assert seen == [False] * 6 + [True] * 2
    error = monitor.error()
    assert isinstance(error, CollapseError)
    assert error.exit_code == 3
    assert "collapsed" in str(error)
    assert "10%" in str(error)


def test_a_fixed_target_never_collapses_however_batches_differ() -> None:
    monitor = CollapseMonitor()
    for seed in range(20):
        monitor.update(random_target(seed), MASK)
        assert not monitor.collapsed


def test_nothing_has_collapsed_before_the_first_look() -> None:
    assert not CollapseMonitor().collapsed


def test_the_joint_objective_collapses_under_training_and_the_monitor_sees_it() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(1, 2, 8, 1, 16, 4)
    student = torch.nn.Parameter(0.1 * torch.randn_like(teacher))
    projection = torch.nn.Parameter(torch.randn(4, 4) / 2)
    # Weight decay as in a run: whatever both sides agree on, smaller is as good.
    optimizer = torch.optim.AdamW([student, projection], lr=3e-2, weight_decay=1.0)
    monitor, losses = CollapseMonitor(), []
    mask = torch.ones(8, 16, dtype=torch.int64)
    for _ in range(150):
        target = teacher @ projection
        loss = (student - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        monitor.update(target.detach(), mask)
    assert losses[-1] < 0.05 * losses[0]
    assert monitor.collapsed


# ---------------------------------------------------------------------- rank

WIDE = (1, 2, 3, 4, 10, 8)  # Of 32 features, more than MASK has tokens.


def wide_target(rank: int, seed: int = 0) -> Tensor:
    """A target of unit variance whose tokens lie in so many directions."""
    generator = torch.Generator().manual_seed(seed)
    layers, kinds, samples, heads, tokens, channels = WIDE
    basis, _ = torch.linalg.qr(torch.randn(layers, kinds, heads * channels, rank, generator=generator))
    places = torch.randn(layers, kinds, samples * tokens, rank, generator=generator) * (heads * channels / rank) ** 0.5
    flat = (places @ basis.mT).unflatten(2, (samples, tokens)).unflatten(4, (heads, channels))
    return flat.transpose(3, 4)


def test_a_target_that_keeps_its_variance_and_loses_its_directions_is_a_collapse() -> None:
    monitor = CollapseMonitor()
    first = monitor.update(wide_target(32), MASK)
    latest = monitor.update(wide_target(1), MASK)
    assert monitor.collapsed
    assert latest.variance > 0.5 * first.variance
    assert latest.effective_rank == pytest.approx(1, rel=0.01)
    assert f"found {latest.variance:.3g} and 1.0" in str(monitor.error())


def test_a_target_that_keeps_some_of_its_directions_has_not_collapsed() -> None:
    monitor = CollapseMonitor()
    monitor.update(wide_target(32), MASK)
    for rank in (16, 8, 4):
        monitor.update(wide_target(rank), MASK)
        assert not monitor.collapsed


def test_a_short_batch_is_held_against_what_it_could_have() -> None:
    """Three tokens have two directions at most: no collapse of what twenty had."""
    monitor = CollapseMonitor()
    monitor.update(wide_target(32), MASK)
    short = torch.zeros_like(MASK)
    short[0, :3] = 1
    health = monitor.update(wide_target(32), short)
    assert health.full_rank == 3
    assert health.effective_rank <= 2.01
    assert not monitor.collapsed


# ---------------------------------------------------------------------- who is taught


def by_hand(student: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """The gradient of one loss alone, all parameters in a row."""
    student.zero_grad()
    loss().backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize("weight", [0.0, 0.01, 1.0, 50.0])
def test_the_gradient_share_is_that_of_gradients_taken_apart(weight: float) -> None:
    torch.manual_seed(0)
    student, inputs, target = nn.Linear(3, 2).double(), torch.randn(7, 3).double(), torch.randn(7, 2).double()

    def kv() -> Tensor:
        return weight * (student(inputs) - target).square().mean()

    def ce() -> Tensor:
        return student(inputs).logsumexp(-1).mean()

    own, rest = by_hand(student, kv).norm(), by_hand(student, ce).norm()
    kv_loss = kv()
    loss = ce() + kv_loss
    assert gradient_share(student, kv_loss, loss) == pytest.approx(float(own / (own + rest)), rel=1e-9)


def test_looking_at_the_gradients_leaves_the_step_as_it_is() -> None:
    torch.manual_seed(0)
    student, inputs = nn.Linear(3, 2), torch.randn(7, 3)
    kv_loss = student(inputs).square().mean()
    loss = student(inputs).logsumexp(-1).mean() + kv_loss
    gradient_share(student, kv_loss, loss)
    assert all(parameter.grad is None for parameter in student.parameters())
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_parameters_that_only_one_loss_reaches_count_for_it_alone() -> None:
    """As those behind the last layer's KV do for the cross-entropy; what neither reaches, or is frozen, for none."""
    student = nn.ParameterDict({name: nn.Parameter(torch.ones(1)) for name in "abcd"})
    student["d"].requires_grad_(False)
    kv_loss = 3 * student["a"].sum()
    loss = kv_loss + 4 * student["b"].sum() + student["d"].sum()
    assert gradient_share(student, kv_loss, loss) == pytest.approx(3 / 7)


def test_a_loss_that_reaches_nothing_has_no_share() -> None:
    student = nn.Linear(2, 2)
    aligner = nn.Parameter(torch.ones(1))
    kv_loss = aligner.square().sum()
    assert gradient_share(student, kv_loss, student(torch.ones(1, 2)).sum() + kv_loss) == 0
    assert gradient_share(student, kv_loss, kv_loss) == 0


def test_a_kv_loss_that_the_student_no_longer_feels_is_absorbed() -> None:
    monitor = CollapseMonitor()
    assert not monitor.absorbed, "nobody has looked yet"
    for share, absorbed in ((0.5, False), (ABSORBED_SHARE, False), (ABSORBED_SHARE / 2, True), (0.0, True)):
        monitor.gradient_share = share
        assert monitor.absorbed is absorbed


@pytest.mark.parametrize("share", [None, 0.0, 0.25])
def test_a_resumed_run_is_still_held_against_its_start(tmp_path: Path, share: float | None) -> None:
    monitor, resumed = CollapseMonitor(), CollapseMonitor()
    monitor.update(wide_target(32), MASK)
    monitor.update(wide_target(4), MASK)
    monitor.gradient_share = share
    monitor.save(tmp_path)
    resumed.load(tmp_path)
    assert (resumed.initial, resumed.latest) == (monitor.initial, monitor.latest)
    assert (resumed.gradient_share, resumed.absorbed) == (share, monitor.absorbed)
    resumed.update(wide_target(1), MASK)
    assert resumed.collapsed
