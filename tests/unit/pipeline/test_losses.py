"""The two losses against slow float64 references, and what padding may not change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpipe.pipeline.losses import IGNORED, kv_mse, next_token_loss
from torch import Tensor


def reference_next_token_loss(logits: Tensor, labels: Tensor) -> list[list[float]]:
    """-log softmax of every labelled token, 0 elsewhere, one float at a time."""
    rows = []
    for row_logits, row_labels in zip(logits.double().tolist(), labels.tolist(), strict=True):
        row = []
        for scores, label in zip(row_logits[:-1], row_labels[1:], strict=True):
            total = math.fsum(math.exp(score) for score in scores)
            row.append(0.0 if label == IGNORED else math.log(total) - scores[label])
        rows.append(row)
    return rows


def reference_kv_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> float:
    """The mean over layers and kinds of each one's mean over its real tokens."""
    means = []
    for layer in range(prediction.shape[0]):
        for kind in range(prediction.shape[1]):
            errors = [
                (float(p) - float(t)) ** 2
                for sample in range(mask.shape[0])
                for token in range(mask.shape[1])
                if mask[sample, token]
                for p, t in zip(
                    prediction[layer, kind, sample, :, token].flatten().tolist(),
                    target[layer, kind, sample, :, token].flatten().tolist(),
                    strict=True,
                )
            ]
            means.append(math.fsum(errors) / len(errors))
    return math.fsum(means) / len(means)


def token_batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(3, 7, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, :4] = IGNORED
    labels[1, 5:] = IGNORED
    return logits, labels


def kv_batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(2, 2, 3, 2, 6, 4, generator=generator, dtype=dtype)
    target = torch.randn(2, 2, 3, 2, 6, 4, generator=generator, dtype=dtype)
    mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4, [1] * 5 + [0]])
    return prediction, target, mask


@pytest.mark.parametrize("seed", range(3))
def test_next_token_loss_is_the_mean_over_labelled_tokens(seed: int) -> None:
    logits, labels = token_batch(seed)
    expected = reference_next_token_loss(logits, labels)
    count = int((labels[:, 1:] != IGNORED).sum())
    assert float(next_token_loss(logits, labels)) == pytest.approx(sum(map(sum, expected)) / count, rel=1e-5)
    each = next_token_loss(logits, labels, reduction="none")
    torch.testing.assert_close(each.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_the_first_label_counts_for_nothing() -> None:
    logits, labels = token_batch()
    changed = labels.clone()
    changed[:, 0] = 3
    assert torch.equal(next_token_loss(logits, labels), next_token_loss(logits, changed))


def test_ignored_tokens_and_more_padding_change_nothing() -> None:
    logits, labels = token_batch()
    loss = next_token_loss(logits, labels)
    noisy = logits.clone()
    # Token t is predicted from the logits at t - 1.
    noisy[:, :-1][labels[:, 1:] == IGNORED] = 1e4
    assert torch.equal(next_token_loss(noisy, labels), loss)
    padded_logits = torch.cat([logits, torch.full((3, 5, 11), 7.0)], dim=1)
    padded_labels = torch.cat([labels, torch.full((3, 5), IGNORED)], dim=1)
    torch.testing.assert_close(next_token_loss(padded_logits, padded_labels), loss)


def test_half_precision_logits_lose_nothing_in_the_softmax() -> None:
    logits, labels = token_batch()
    half = logits.bfloat16()
    assert next_token_loss(half, labels).dtype == torch.float32
    assert torch.equal(next_token_loss(half, labels), next_token_loss(half.float(), labels))


def test_a_batch_without_a_labelled_token_gives_zero_and_no_gradient() -> None:
    logits, labels = token_batch()
    logits.requires_grad_()
    loss = next_token_loss(logits, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("seed", range(3))
def test_kv_mse_is_the_mean_over_layers_kinds_and_real_tokens(seed: int) -> None:
    prediction, target, mask = kv_batch(seed)
    assert float(kv_mse(prediction, target, mask)) == pytest.approx(
        reference_kv_mse(prediction, target, mask), rel=1e-5
    )


def test_kv_mse_of_one_kind_averages_to_that_of_both() -> None:
    prediction, target, mask = kv_batch()
    parts = [kv_mse(prediction[:, k : k + 1], target[:, k : k + 1], mask) for k in range(2)]
    torch.testing.assert_close(sum(parts) / 2, kv_mse(prediction, target, mask))


def test_masked_tokens_do_not_touch_kv_mse() -> None:
    prediction, target, mask = kv_batch()
    padding = ~mask.bool()[None, None, :, None, :, None].expand_as(prediction)
    assert torch.equal(
        kv_mse(prediction.masked_fill(padding, 1e6), target.masked_fill(padding, -3e5), mask),
        kv_mse(prediction, target, mask),
    )


@given(extra=st.integers(1, 9), seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_more_padding_does_not_touch_kv_mse(extra: int, seed: int) -> None:
    prediction, target, mask = kv_batch(seed)
    filler = torch.full((2, 2, 3, 2, extra, 4), 9.0)
    padded = kv_mse(
        torch.cat([prediction, filler], dim=4),
        torch.cat([target, -filler], dim=4),
        torch.cat([mask, torch.zeros(3, extra, dtype=mask.dtype)], dim=1),
    )
    torch.testing.assert_close(padded, kv_mse(prediction, target, mask))


def test_predicting_the_mean_of_a_unit_variance_target_scores_one() -> None:
    target = torch.randn(1, 2, 4, 2, 2000, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 2000, dtype=torch.int64)
    assert float(kv_mse(torch.zeros_like(target), target, mask)) == pytest.approx(1, abs=0.02)


def test_the_gradient_of_kv_mse_agrees_with_finite_differences() -> None:
    prediction, target, mask = kv_batch(dtype=torch.float64)
    prediction.requires_grad_()
    target.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, t: kv_mse(p, t, mask), (prediction, target))


def test_masked_tokens_get_no_gradient() -> None:
    prediction, target, mask = kv_batch()
    prediction.requires_grad_()
    kv_mse(prediction, target, mask).backward()
    assert prediction.grad is not None
    per_token = prediction.grad.abs().sum(dim=(0, 1, 3, 5))
    assert torch.equal(per_token > 0, mask.bool())
