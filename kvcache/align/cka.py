"""How alike two sets of features are, whatever their size and their basis: linear CKA (Kornblith et al., 2019)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..layout import token_features


class LinearCKA:
    """Linear CKA (Kornblith et al., 2019) of two sets of features, streamed over batches of tokens."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: list[Tensor] = []
        self._products: list[Tensor] = []

    def update(self, x: Float[Tensor, "N F"], y: Float[Tensor, "N G"]) -> None:
        """Add N tokens seen from both sides."""
        x, y = x.double(), y.double()
        sums, products = [x.sum(0), y.sum(0)], [x.T @ y, x.T @ x, y.T @ y]
        self._count += len(x)
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._products = [a + b for a, b in zip(self._products, products, strict=True)] if self._products else products

    def value(self) -> float:
        """From 0 (unrelated) to 1 (equal up to rotation and scale)."""
        sx, sy = self._sums
        xy, xx, yy = self._products
        cross = (xy - torch.outer(sx, sy) / self._count).norm().square()
        own_x = (xx - torch.outer(sx, sx) / self._count).norm()
        own_y = (yy - torch.outer(sy, sy) / self._count).norm()
        return float(cross / (own_x * own_y).clamp_min(1e-12))


class CKAMatrix:
    """Linear CKA of every student layer with every teacher layer, streamed over batches of tokens.

    Takes `2 * Ls * Lt * Hs * Ds * Ht * Dt` numbers of memory, whatever the number of tokens.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sides: tuple[_Side, _Side] | None = None
        self._cross = torch.zeros(())

    @torch.no_grad()
    def update(
        self,
        student_kv: Shaped[Tensor, "Ls 2 B Hs T Ds"],
        teacher_kv: Shaped[Tensor, "Lt 2 B Ht T Dt"],
        mask: Int[Tensor, "B T"],
    ) -> None:
        """Add the tokens of a batch that the mask names."""
        if self._sides is None:
            self._sides = _Side(student_kv), _Side(teacher_kv)
            shape = (len(student_kv), len(teacher_kv), 2, *(side.sums.shape[-1] for side in self._sides))
            self._cross = torch.zeros(shape, dtype=torch.float64, device=student_kv.device)
        student, teacher = self._sides
        self._count += int(mask.bool().sum())
        rows = [token_features(layer, mask).double() for layer in student_kv]
        for layer, x in enumerate(rows):
            student.add(layer, x)
        for layer, kv in enumerate(teacher_kv):
            y = token_features(kv, mask).double()
            teacher.add(layer, y)
            for row, x in enumerate(rows):
                self._cross[row, layer].baddbmm_(x.mT, y)

    def by_kind(self) -> Float[Tensor, "2 Ls Lt"]:
        """Key and value apart. Layers that never vary, or of which no token was seen, have 0."""
        assert self._sides is not None
        student, teacher = self._sides
        count = max(1, self._count)
        cross = torch.stack(
            [
                (products - sums[None, :, :, None] * teacher.sums[:, :, None] / count).square().sum(dim=(2, 3))
                for products, sums in zip(self._cross, student.sums, strict=True)
            ]
        )
        own = student.spread(count)[:, None] * teacher.spread(count)
        return torch.where(own > 0, cross / own, 0).movedim(2, 0)

    def value(self) -> Float[Tensor, "Ls Lt"]:
        """The mean of key and value."""
        return self.by_kind().mean(dim=0)


class _Side:
    """Sums and products of the features of every layer, key and value apart."""

    def __init__(self, kv: Shaped[Tensor, "L 2 B H T D"]) -> None:
        features = kv.shape[3] * kv.shape[5]
        self.sums = torch.zeros(len(kv), 2, features, dtype=torch.float64, device=kv.device)
        self.products = self.sums.new_zeros(len(kv), 2, features, features)

    def add(self, layer: int, x: Float[Tensor, "2 N F"]) -> None:
        self.sums[layer] += x.sum(dim=1)
        self.products[layer].baddbmm_(x.mT, x)

    def spread(self, count: int) -> Float[Tensor, "L 2"]:
        """The norm of the centred products. Where it is but rounding, features never vary, and it is 0."""
        centred = self.products - self.sums[..., :, None] * self.sums[..., None, :] / count
        norm = centred.norm(dim=(2, 3))
        return torch.where(norm > 1e-10 * self.products.norm(dim=(2, 3)), norm, 0)
