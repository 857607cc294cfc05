"""The health of a distillation target, and when a run counts as collapsed."""

from __future__ import annotations

import math

import pytest
import torch
from kvpipe.kvcache.errors import CollapseError
from kvpipe.pipeline.monitor import COLLAPSE_RATIO, CollapseMonitor, effective_rank, target_health
from torch import Tensor

SHAPE = (2, 2, 3, 2, 10, 4)  # [L, 2, B, H, T, D]
MASK = torch.tensor([[1] * 10, [1] * 6 + [0] * 4, [1] * 3 + [0] * 7])


def random_target(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_identity_has_full_rank(size: int) -> None:
    assert effective_rank(torch.eye(size)) == pytest.approx(size, rel=1e-5)


def test_an_orthogonal_basis_has_full_rank_whatever_its_scale() -> None:
    basis, _ = torch.linalg.qr(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))
    assert effective_rank(basis) == pytest.approx(6, rel=1e-4)
    assert effective_rank(1e-3 * basis) == pytest.approx(6, rel=1e-4)


def test_a_single_direction_has_rank_one() -> None:
    generator = torch.Generator().manual_seed(0)
    assert effective_rank(torch.outer(torch.randn(30, generator=generator), torch.randn(8, generator=generator))) < 1.01
    assert effective_rank(torch.zeros(5, 3)) == pytest.approx(1)


def test_rank_is_the_exponential_of_the_entropy_of_singular_values() -> None:
    entropy = -sum(share * math.log(share) for share in (0.5, 0.3, 0.2))
    assert effective_rank(torch.diag(torch.tensor([5.0, 3.0, 2.0]))) == pytest.approx(math.exp(entropy), rel=1e-5)


def test_health_is_over_real_tokens_and_averaged_over_layers_and_kinds() -> None:
    target = random_target()
    target[..., 0] *= 3
    variances, ranks = [], []
    for layer in range(SHAPE[0]):
        for kind in range(2):
            rows = [target[layer, kind, b, :, t].flatten() for b in range(3) for t in range(10) if MASK[b, t]]
            tokens = torch.stack(rows).double()
            variances.append(tokens.var(0, correction=0).mean())
            ranks.append(effective_rank((tokens - tokens.mean(0)).float()))
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
