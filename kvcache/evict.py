"""Which tokens' KV is worth its bytes: a policy scores every token of a sample, and the best within a budget stay.

A sample keeps one set of tokens for all layers and heads, so that a store stays one array; methods that choose for
every head apart are averaged over heads and layers. The places of the tokens that stay are stored beside their KV.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from .errors import ConfigError
from .layout import Pairs

RECENT = 2.0**20
"""Above every score, and small enough for float32 to tell places apart beside it."""


@dataclass(frozen=True)
class Observed:
    """What a policy may look at: a batch's samples by their places in the store, their `lengths`, and key and value
    `[B, H, T, D]` of every layer; with `queries`, one `[B, Hq, W, D]` a layer, those at the places `window` `[B, W]`,
    times the scale of the attention (negative where a sample has fewer tokens)."""

    samples: Sequence[int]
    lengths: Int[Tensor, " B"]
    pairs: Pairs
    seed: int
    queries: list[Float[Tensor, "B Hq W D"]] | None = None
    window: Int[Tensor, "B W"] | None = None

    @property
    def num_tokens(self) -> int:
        return self.pairs[0][0].shape[2]


class Eviction(ABC):
    """A policy: one method to override."""

    window = 0
    """How many of a sample's last queries it looks at."""

    @abstractmethod
    def scores(self, observed: Observed) -> Float[Tensor, "B T"]:
        """The higher, the sooner a token is kept. What is said of tokens past a sample's end means nothing."""


class RightCrop(Eviction):
    """The first tokens stay."""

    def scores(self, observed: Observed) -> Float[Tensor, "B T"]:
        return -torch.arange(observed.num_tokens, dtype=torch.float32).expand(len(observed.samples), -1)


class Random(Eviction):
    """Tokens drawn by the seed and the sample: the control that any other policy has to beat."""

    def scores(self, observed: Observed) -> Float[Tensor, "B T"]:
        shape = len(observed.samples), observed.num_tokens
        drawn = np.zeros(shape, np.float32)
        for row, (sample, length) in enumerate(zip(observed.samples, observed.lengths.tolist(), strict=True)):
            drawn[row, :length] = np.random.default_rng([observed.seed, sample]).random(length, np.float32)
        return torch.from_numpy(drawn)


class RKV(Eviction):
    """R-KV (arXiv:2505.24133): attended tokens stay, those whose keys say what others say go.

    `MIX * importance - (1 - MIX) * redundancy`. Importance is the attention of the last `window` queries, widened to
    neighbours; redundancy the softmax over tokens of the mean cosine similarity with all keys, where every key
    leaves out the last of those much like it. The last `window` tokens come before all others, the last of all first.
    Beyond the paper: every sample ends at its own last token, however long the batch, and heads and layers are
    averaged.
    """

    window = 8
    MIX = 0.1
    NEIGHBOURS = 7
    ALIKE = 0.5

    def scores(self, observed: Observed) -> Float[Tensor, "B T"]:
        assert observed.queries is not None
        assert observed.window is not None
        device = observed.pairs[0][0].device
        lengths, window = observed.lengths.to(device), observed.window.to(device)
        real = torch.arange(observed.num_tokens, device=device) < lengths[:, None]
        total = torch.zeros(real.shape, device=device)
        for (key, _), queries in zip(observed.pairs, observed.queries, strict=True):
            importance = self._importance(key.float(), queries.float(), window)
            total += self.MIX * importance.mean(1)
            for row, length in enumerate(observed.lengths.tolist()):
                total[row, :length] -= (1 - self.MIX) * self._redundancy(key[row, :, :length].float()).mean(0)
        places = torch.arange(observed.num_tokens, device=device)
        recent = (places >= lengths[:, None] - self.window) & real
        return torch.where(recent, RECENT + places, total)

    def _importance(
        self, key: Float[Tensor, "B H T D"], queries: Float[Tensor, "B Hq W D"], window: Int[Tensor, "B W"]
    ) -> Float[Tensor, "B H T"]:
        grouped = queries.unflatten(1, (key.shape[1], -1))
        logits = grouped @ key[:, :, None].transpose(-1, -2)
        seen = torch.arange(key.shape[2], device=key.device) <= window[:, None, None, :, None]
        # A query that is not there sees nothing, and its softmax is no number.
        attention = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0).mean(2)
        attention = attention.sum(2) / (window >= 0).sum(1)[:, None, None]
        return F.max_pool1d(attention, self.NEIGHBOURS, stride=1, padding=self.NEIGHBOURS // 2)

    def _redundancy(self, key: Float[Tensor, "H T D"]) -> Float[Tensor, "H T"]:
        """Of one sample: every one has its own square of similarities, and no more than that."""
        unit = F.normalize(key, dim=-1)
        similarity = unit @ unit.transpose(-1, -2)
        similarity.diagonal(dim1=-2, dim2=-1).zero_()
        alike = similarity > self.ALIKE
        # argmax finds the first of the greatest: among flipped tokens, the last alike.
        last = key.shape[1] - 1 - alike.flip(-1).byte().argmax(-1, keepdim=True)
        spared = torch.zeros_like(alike).scatter_(-1, last, value=True) & alike
        return similarity.masked_fill_(spared, 0).mean(-2).softmax(-1)


POLICIES: dict[str, Eviction] = {"right-crop": RightCrop(), "random": Random(), "rkv": RKV()}
NONE = "none"


def require_policy(name: str) -> Eviction:
    """The policy of a name; where nothing but whole segments is evicted, all tokens fit, and any will do. Raises
    ConfigError for one that this version does not know."""
    if name not in (NONE, *POLICIES):
        raise ConfigError(
            "unknown eviction policy",
            expected=", ".join((NONE, *POLICIES)),
            found=name,
            remedy="Choose another --evict",
        )
    return POLICIES.get(name, POLICIES["right-crop"])


def require_reachable(budget: float | None, longest: int) -> None:
    """Raise ConfigError where no sample has a token that may be kept, or none reaches the budget."""
    if longest < 1:
        raise ConfigError(
            "no token is left to keep", expected="at least 1 in some sample", found=longest, remedy="Mend --segments"
        )
    if budget is not None and budget > longest:
        raise ConfigError(
            "the budget is larger than every sample",
            expected=f"at most {longest} tokens",
            found=f"{budget:g}",
            remedy="Lower --budget, or keep all with --evict none",
        )


def kept_lengths(eligible: NDArray[np.int32], budget: float | None) -> NDArray[np.int32]:
    """How many tokens each sample keeps of those `[B]` that are eligible: a share of them, rounded up, or at most a
    number."""
    if budget is None:
        return eligible
    if budget < 1:
        # Rounded first: 100 * 0.07 is a little more than 7.
        return np.maximum(np.ceil(np.round(eligible * budget, 6)), eligible > 0).astype(np.int32)
    return np.minimum(eligible, int(budget)).astype(np.int32)


def choose_tokens(
    scores: Float[Tensor, "B T"], eligible: Bool[Tensor, "B T"], counts: Int[Tensor, " B"]
) -> Int[Tensor, "B K"]:
    """Places of the best `counts` eligible tokens of every sample, in reading order; -1 past the last. Of equals the
    first is kept."""
    num_tokens = scores.shape[1]
    best = scores.masked_fill(~eligible, -math.inf).argsort(dim=1, descending=True, stable=True)
    best = best[:, : max(1, int(counts.max()))]
    spare = torch.arange(best.shape[1], device=best.device) >= counts.to(best.device)[:, None]
    ordered = best.masked_fill(spare, num_tokens).sort(1).values
    return ordered.masked_fill(ordered == num_tokens, -1)
