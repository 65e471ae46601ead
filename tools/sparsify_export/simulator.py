"""Cycles of a sparse accelerator with a dense and a sparse engine, for the zeros of one weight matrix or of a model.

The machine is ViTCoD's (You et al. 2023, "ViTCoD: Vision Transformer Acceleration via Dedicated Algorithm and
Accelerator Co-Design") as Table 5 of BESA uses it (Xu et al. 2024, "BESA: Pruning Large Language Models with Blockwise
Parameter-Efficient Sparsity Allocation"): 64 lines of 64 multipliers. Columns of the weight with many non-zeros are
called global and go to the dense engine, which gets so many multipliers of every line as its share of the work; the
others go to the sparse engine. Both run at once. Nothing here was measured on hardware.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

LINES, WIDTH = 64, 64
BYTES_PER_CYCLE = 76.8e9 / 500e6
"""ViTCoD's memory: 76.8 GB/s at 500 MHz."""

TRIES = 5


@dataclass(frozen=True)
class Cycles:
    """One linear on the accelerator.

    Attributes:
        path: the linear.
        shape: ``(out_features, in_features)``.
        zeros: fraction of its weights that are zero.
        dense: cycles with every weight in the dense engine.
        sparse: cycles with the zeros skipped.
    """

    path: str
    shape: tuple[int, int]
    zeros: float
    dense: int
    sparse: int


def simulate(path: str, weight: Tensor, *, tokens: int = 1, paper_compat: bool = False) -> Cycles:
    """Cycles of ``y = W x`` for the zeros of one weight.

    Args:
        path: what to call it.
        weight: ``[R, C]`` = ``[out_features, in_features]``, any dtype, at least one entry; a keep mask does as well.
        tokens: columns of x; the published formula knows one.
        paper_compat: ``published_cycles`` instead of ``cycles``.

    Raises:
        ValueError: ``weight`` is empty or no matrix, or ``paper_compat`` is asked for several tokens.
    """
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"{path}: want a weight [out_features, in_features], got shape {list(weight.shape)}")
    if paper_compat and tokens != 1:
        raise ValueError(f"the published formula is for one token, not {tokens}")
    keep = weight != 0
    rows, columns = keep.shape
    full = torch.ones(1, 1, dtype=torch.bool).expand(rows, columns)
    everything = torch.ones(columns, dtype=torch.bool)
    zeros = 1 - int(keep.sum()) / keep.numel()
    if paper_compat:
        dense = sum(published_cycles(part, everything[: part.shape[1]]) for part in _patches(full))
        sparse = sum(_best(part, published_cycles) for part in _patches(keep))
    else:
        dense = cycles(full, everything, tokens=tokens)
        either = (cycles(keep, everything, tokens=tokens), cycles(keep, ~everything, tokens=tokens))
        sparse = min(*either, _best(keep, lambda part, columns: cycles(part, columns, tokens=tokens)))
    return Cycles(path, (rows, columns), zeros, dense, max(1, sparse))


def published_cycles(keep: Tensor, is_global: Tensor) -> int:
    r"""Cycles as BESA's code counts them, for one token.

    .. math::
        d = \lfloor 64\, GR / (GR + n) \rfloor, \qquad
        \max\big(\lceil CG / 64d \rceil,\ \lceil n / 64(64 - d) \rceil\big)

    R rows, C columns, G of them global, n non-zeros in the others. It has C G where the dense engine's products are
    R G, so a matrix that is not square is charged too little or too much. An engine with work gets at least one
    multiplier of a line; without that the formula would divide by zero.

    Args:
        keep: bool ``[R, C]``, the non-zeros.
        is_global: bool ``[C]``.
    """
    rows, columns = keep.shape
    nonzeros, count = int(keep[:, ~is_global].sum()), int(is_global.sum())
    dense, sparse = _widths(rows * count, nonzeros)
    return max(_ratio(columns * count, dense * LINES), _ratio(nonzeros, sparse * LINES))


def cycles(keep: Tensor, is_global: Tensor, *, tokens: int = 1) -> int:
    r"""Cycles with what the published formula leaves out: the true number of products, uneven rows, and memory.

    .. math::
        \max\Big(T \lceil R/64 \rceil \lceil G/d \rceil,\
        T \sum_{g} \lceil \max_{i \in g} n_i / (64 - d) \rceil,\ B / 153.6\Big)

    - The dense engine has R G products a token, not C G. A line takes one row at a time.
    - The sparse engine takes 64 rows g at a time, in the order they have; all lines wait for the row with the most
      non-zeros :math:`n_i`.
    - B bytes are read once: one for each weight of a global column and each other non-zero (8-bit weights, as ViTCoD),
      and their positions, as a bitmap or as column numbers, whichever is less. Reading overlaps with computing.

    Args:
        keep: bool ``[R, C]``, the non-zeros.
        is_global: bool ``[C]``.
        tokens: T.
    """
    rows, count = len(keep), int(is_global.sum())
    others = keep.shape[1] - count
    each = keep[:, ~is_global].sum(dim=1)
    nonzeros = int(each.sum())
    dense, sparse = _widths(rows * count, nonzeros)
    longest = [int(group.max()) for group in torch.split(each, LINES)]
    in_dense = tokens * _ratio(rows, LINES) * _ratio(count, dense)
    in_sparse = tokens * sum(_ratio(length, sparse) for length in longest)
    bits = min(rows * others, nonzeros * math.ceil(math.log2(others))) if others > 1 and nonzeros else 0
    size = rows * count + nonzeros + bits / 8
    return max(in_dense, in_sparse, math.ceil(size / BYTES_PER_CYCLE))


def by_projection(found: Iterable[Cycles]) -> dict[str, list[Cycles]]:
    """Linears whose paths differ in numbers only, such as the same projection of every layer."""
    groups: dict[str, list[Cycles]] = {}
    for one in found:
        groups.setdefault(re.sub(r"(?<![^./_])\d+(?![^./_])", "*", one.path), []).append(one)
    return groups


def render(found: Iterable[Cycles]) -> Table:
    """The table that the command line shows: mean cycles of each projection, and the total."""
    table = Table(
        *("projection", "linears", "shape", "zeros", "dense", "sparse", "speed-up"),
        title="Simulated cycles of one call, mean of the linears",
        title_justify="left",
    )
    table.columns[0].overflow = "fold"
    everything: list[Cycles] = []
    for name, group in by_projection(found).items():
        shapes = sorted({" x ".join(map(str, one.shape)) for one in group})
        table.add_row(name, str(len(group)), ", ".join(shapes), *_means(group, len(group)))
        everything += group
    table.add_section()
    table.add_row("all together", str(len(everything)), "", *_means(everything, 1))
    return table


def _means(group: list[Cycles], count: int) -> tuple[str, str, str, str]:
    weights = sum(math.prod(one.shape) for one in group)
    zeros = sum(one.zeros * math.prod(one.shape) for one in group) / weights
    dense, sparse = sum(one.dense for one in group), sum(one.sparse for one in group)
    return f"{zeros:.1%}", f"{dense / count:,.0f}", f"{sparse / count:,.0f}", f"{dense / sparse:.2f}x"


def _best(keep: Tensor, cost: Callable[[Tensor, Tensor], int]) -> int:
    """The fewest cycles of up to five splits; the search ends where each engine has about half of the non-zeros."""
    in_column = keep.sum(dim=0)
    nonzeros = int(in_column.sum())
    tenths, fewest = 5, None
    for _ in range(TRIES):
        is_global = 10 * in_column > tenths * len(keep)
        now = cost(keep, is_global)
        fewest = now if fewest is None else min(fewest, now)
        share = int(in_column[is_global].sum()) / max(1, nonzeros)
        if 0.4 < share < 0.6:
            break
        tenths += 1 if share >= 0.6 else -1
    assert fewest is not None
    return fewest


def _patches(keep: Tensor) -> Iterator[Tensor]:
    """A matrix wider than high is cut into columns as many as it has rows, one after the other."""
    yield from torch.split(keep, len(keep), dim=1)


def _widths(dense: int, sparse: int) -> tuple[int, int]:
    """How many multipliers of a line each engine gets, by its work; at least one where there is work."""
    if dense + sparse == 0:
        return 0, WIDTH
    width = WIDTH * dense // (dense + sparse)
    if dense and sparse:
        width = min(max(width, 1), WIDTH - 1)
    return width, WIDTH - width


def _ratio(work: int, rate: int) -> int:
    """Whole cycles; no work takes none."""
    return -(-work // rate) if work else 0
