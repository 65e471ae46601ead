"""The forms that one linear can have in a file: what is pruned of its weight, and how the rest is stored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibrate import grid
from ..calibrate.masks import keep_mask
from ..calibrate.patterns import NM, Pattern, Unstructured
from ..calibrate.scores import wanda
from .dialect import linear_codes
from .dialect.packed import packed_bytes
from .dialect.storage import FP32, Storage


@dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
        pattern: of its zeros; None for a dense weight.
        storage: of its weight. A dense one is float32, or int8 or int4 and then ``blocked``.

    Raises:
        ValueError: nothing runs a dense weight that is stored so.
    """

    pattern: Pattern | None = None
    storage: Storage = FP32

    def __post_init__(self) -> None:
        dense = self.storage == FP32 or self.storage.blocked
        if dense != (self.pattern is None) and self.storage != FP32:
            raise ValueError(f"{self.pattern or 'dense'} weights cannot be stored as {self.storage}")

    def __str__(self) -> str:
        zeros = "dense" if self.pattern is None else str(self.pattern)
        return f"{zeros} {self.storage.kind}" + (f" g{self.storage.group}" if self.storage.group else "")

    @property
    def dense(self) -> bool:
        """Whether it is the float32 weight as it was."""
        return self.pattern is None and self.storage == FP32

    @property
    def density(self) -> float:
        """The fraction of weights that is kept."""
        return 1 - self.pattern.sparsity if self.pattern else 1.0

    def fits(self, in_features: int) -> bool:
        """Whether a weight with so many columns can have it."""
        return not isinstance(self.pattern, NM) or in_features % self.pattern.m == 0

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Size of the weight as stored (of unstructured int4: at most)."""
        if self.storage.blocked:
            return linear_codes.packed_bytes(out_features, in_features, self.storage)
        size = out_features * in_features
        if self.pattern is None:
            return size * 4
        kept = out_features * (in_features - int(self.pattern.sparsity * in_features + 0.5))
        return packed_bytes(out_features, in_features, kept, self.pattern, self.storage)

    def cannot_hurt_more(self, other: "Form") -> bool:
        """Whether it keeps all that the other keeps, at least as exactly, whatever the weight is.

        Zeros anywhere are the best choice among all that prune as much of every row, so they do not hurt more than a
        pattern does; nor do groups of 2m with 2n kept more than those of m with n, which are among them.
        """
        order = ("fp32", "fp16", "bf16", "int8", "int4")
        mine, its = self.storage, other.storage
        finer = order.index(mine.kind) <= order.index(its.kind) and (mine.group or 0) <= (its.group or mine.group or 0)
        return finer and _keeps_as_much(self.pattern, other.pattern)

    def applied(self, weight: Tensor, norm: Tensor) -> Tensor:
        """A weight in this form without an update: Wanda's mask, then every number to the nearest that is stored.

        Args:
            weight: ``[out_features, in_features]`` float32.
            norm: of its inputs, ``[in_features]``.
        """
        if self.pattern is not None:
            weight = torch.where(keep_mask(wanda(weight, norm), self.pattern, "row"), weight, 0.0)
        if not self.storage.quantised:
            return weight.to(self.storage.dtype).float()
        its = self.storage.grid
        top = grid.largest(weight, its)
        scale = grid.scales(top, torch.ones_like(top), its)
        return grid.quantise(weight, grid.spread(scale, weight.shape[1], its), its)


def _keeps_as_much(mine: Pattern | None, other: Pattern | None) -> bool:
    if mine is None or other is None:
        return mine is None
    if isinstance(mine, Unstructured):
        return mine.sparsity <= other.sparsity
    if isinstance(other, Unstructured) or mine.m % other.m:
        return False
    return mine.n * other.m >= other.n * mine.m
