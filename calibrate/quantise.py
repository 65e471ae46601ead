"""Put a pruned weight on a grid so that the layer's output changes least: one sweep, then coordinate descent."""

import torch
from torch import Tensor

from .grid import Grid, quantise, spread
from .matmul import product

BLOCK = 128  # columns whose errors reach the others in one product
PASSES = 3


def sweep(weight: Tensor, factor: Tensor, keep: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    r"""Round column after column, and let the kept weights to the right make up for each error.

    With U the upper Cholesky factor of the inverse Hessian, for every column j from left to right:

    .. math:: q_j = m_j \odot Q(w_j), \qquad e = \frac{w_j - q_j}{U_{jj}}, \qquad
              w_k \leftarrow w_k - e\, U_{jk} \quad (k > j)

    Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", section 3.5,
    with the mask m fixed and the scales chosen before the first column. A pruned weight may move while the sweep is to
    its left; its way back to 0 is an error like any other.

    Args:
        weight: ``[R, C]`` float32, pruned.
        factor: U, float32 ``[C, C]``; see `damping.sweep_factor`.
        keep: bool ``[R, C]``.
        scale: ``[R, G]`` of `grid.scales`.
        grid: the grid.

    Returns:
        On the grid, +0.0 where pruned.
    """
    columns = weight.shape[1]
    # Columns as rows: what is read together lies together. Clones, since a single row is contiguous either way.
    w, kept = weight.mT.clone(memory_format=torch.contiguous_format), keep.mT.contiguous()
    steps = spread(scale, columns, grid).mT
    done = torch.empty_like(w)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        u = factor[start:end, start:end]
        block, errors = w[start:end], torch.empty(end - start, w.shape[1])
        for j, column in enumerate(range(start, end)):
            done[column] = torch.where(kept[column], quantise(block[j], steps[column], grid), 0.0)
            errors[j] = (block[j] - done[column]) / u[j, j]
            block[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
        w[end:] -= product(factor[start:end, end:].mT, errors)
    return done.mT.contiguous()


def descend(
    weight: Tensor, hessian: Tensor, keep: Tensor, scale: Tensor, grid: Grid, start: Tensor, *, passes: int = PASSES
) -> Tensor:
    r"""Move one column after another to its best place on the grid, the others standing still.

    .. math:: q_j \leftarrow Q\Bigl(q_j - \frac{[(q - w) H]_j}{H_{jj}}\Bigr) \quad\text{where kept}

    Behdin et al. 2023, "QuantEase: Optimization-based Quantization for Language Models", algorithm 2. In one column
    the error is a parabola, so the place next to its lowest point is the best one: no step raises the error.

    Args:
        weight: ``[R, C]`` float32, w: what is to be reproduced.
        hessian: ``[C, C]`` float32, positive semidefinite.
        keep: bool ``[R, C]``.
        scale: ``[R, G]`` of `grid.scales`.
        grid: the grid.
        start: where to begin, on the grid.
        passes: how many times over all columns.

    Returns:
        On the grid, +0.0 where pruned.
    """
    columns = weight.shape[1]
    q, kept = start.mT.clone(memory_format=torch.contiguous_format), keep.mT.contiguous()
    steps = spread(scale, columns, grid).mT
    slope = product(start - weight, hessian).mT.contiguous()
    curvature = hessian.diagonal()
    for _ in range(passes):
        for first in range(0, columns, BLOCK):
            end = min(first + BLOCK, columns)
            inside, near = hessian[first:end, first:end], slope[first:end]
            moves = torch.zeros(end - first, q.shape[1])
            for j, column in enumerate(range(first, end)):
                if curvature[column] > 0:
                    wanted = q[column] - near[j] / curvature[column]
                    best = torch.where(kept[column], quantise(wanted, steps[column], grid), 0.0)
                    moves[j], q[column] = best - q[column], best
                    near.addr_(inside[j], moves[j])
            slope[:first] += product(hessian[:first, first:end], moves)
            slope[end:] += product(hessian[end:, first:end], moves)
    return torch.where(kept, q, 0.0).mT.contiguous()
