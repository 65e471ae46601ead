"""Which zeros a sparse format can hold: N:M along in_features, or a free fraction; and which of them a weight has."""

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

Group: TypeAlias = Literal["row", "matrix"]
"""The weights that compete with each other under an unstructured target: one output row, or the whole matrix."""


@dataclass(frozen=True)
class NM:
    """``n`` weights are KEPT in every aligned group of ``m`` neighbours along in_features.

    NVIDIA's meaning of "2:4". The Wanda, RIA and SparseGPT scripts count the pruned weights instead; the
    two agree only when n is half of m.

    Raises:
        ValueError: not ``0 < n < m``, or m outside 2 to 32.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (0 < self.n < self.m and self.m <= 32):
            raise ValueError(f"N:M wants n kept of m with 0 < n < m <= 32, got {self.n}:{self.m}")

    @classmethod
    def parse(cls, text: str) -> "NM":
        """Read ``"2:4"``.

        Raises:
            ValueError: the text is not two numbers around a colon, or not a legal pattern.
        """
        match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text, flags=re.ASCII)
        if match is None:
            raise ValueError(f"N:M wants two whole numbers like 2:4 (2 kept of every 4), got {text!r}")
        return cls(int(match[1]), int(match[2]))

    @property
    def sparsity(self) -> float:
        """The fraction of zeros, 0 to 1."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere; ``sparsity`` is their fraction.

    Raises:
        ValueError: not ``0 < sparsity < 1``.
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:  # also refuses NaN
            raise ValueError(f"sparsity wants a fraction of zeros between 0 and 1, both excluded, got {self.sparsity}")

    def __str__(self) -> str:
        return f"{self.sparsity:g}"


Pattern: TypeAlias = NM | Unstructured


def parse(text: str) -> Pattern:
    """Read what ``str`` makes of a pattern.

    Raises:
        ValueError: it is neither two numbers around a colon nor a fraction.
    """
    return NM.parse(text) if ":" in text else Unstructured(float(text))


@dataclass(frozen=True, eq=False)
class RowCounts:
    """Zeros anywhere in a row, and for every row how many.

    Attributes:
        pruned: int64 ``[out_features]``, 0 to in_features.
    """

    pruned: torch.Tensor


def largest_group_count(weight: torch.Tensor, m: int) -> int:
    """Count the non-zeros of the fullest aligned group of ``m`` along the last axis.

    Args:
        weight: ``[..., in_features]``, any dtype; a bool mask of the non-zeros does as well. NaN is non-zero.
        m: group length; the last group of a row must be whole.

    Returns:
        0 to ``m``; 0 for an empty tensor.

    Raises:
        ValueError: in_features is not a multiple of ``m``.
    """
    if weight.shape[-1] % m:
        raise ValueError(f"in_features {weight.shape[-1]} is not a multiple of the group length {m}")
    if weight.numel() == 0:
        return 0
    nonzero = (weight != 0).view(torch.uint8)
    count = nonzero[..., 0::m].clone()
    for place in range(1, m):  # m strided adds: a sum over an axis of length m is many times slower
        count += nonzero[..., place::m]
    return int(count.max())


def fits(weight: torch.Tensor, nm: NM) -> bool:
    """Whether no aligned group along the last axis holds more than ``nm.n`` non-zeros.

    Raises:
        ValueError: in_features is not a multiple of ``nm.m``.
    """
    return largest_group_count(weight, nm.m) <= nm.n


def find_pattern(weight: torch.Tensor, *, min_sparsity: float = 0.3) -> Pattern | None:
    """Name the pattern of a weight that is already sparse.

    The smallest group length wins (1:4, 2:4, 3:4, then m = 8, 16, 32), with n the fullest group's count, so a
    1:4 weight is not called 2:4 and a 2:4 weight is not called 4:8. A fit may be an accident: very sparse weights
    fit everything, and in a small random weight no group of 32 may be quite full. So the non-zeros must also
    fill most of the places that the pattern offers, counted over the rows that are not all zero. Half of them
    is enough for 1:4 and 2:4, the forms with hardware behind them.

    Args:
        weight: ``[out_features, in_features]``, any dtype.
        min_sparsity: the fraction of zeros from which a weight without N:M structure counts as sparse.

    Returns:
        The pattern, or None for a dense weight. An all-zero or empty weight is None: it fits every pattern.
    """
    nonzero = weight != 0
    kept = int(nonzero.sum())
    # 31:32 is the fullest pattern there is; most weights end here, before any group is counted
    if kept == 0 or kept > weight.numel() * 31 / 32:
        return None
    live = nonzero[nonzero.any(dim=-1)]
    for m in (4, 8, 16, 32):
        if weight.shape[-1] % m:
            break
        n = largest_group_count(live, m)
        needed = 0.5 if m == 4 and n <= 2 else 0.9
        if n < m and kept >= needed * live.numel() * n / m:
            return NM(n, m)
    sparsity = (weight.numel() - kept) / weight.numel()
    return Unstructured(sparsity) if sparsity >= min_sparsity else None
