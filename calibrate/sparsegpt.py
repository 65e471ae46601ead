"""SparseGPT: one sweep over the columns that prunes and hands every column's error to those that follow."""

import math

import torch
from torch import Tensor

from .masks import count_keep_mask, nm_keep_mask
from .matmul import product
from .patterns import NM, Pattern, Unstructured

BLOCK = 128  # columns: Frantar & Alistarh 2023, section 3.4


def sweep(weight: Tensor, factor: Tensor, target: Pattern | Tensor) -> tuple[Tensor, Tensor]:
    r"""Prune a weight and let the weights right of each pruned one make up for it.

    With U the upper Cholesky factor of the inverse Hessian, for every column j from left to right:

    .. math:: e = \frac{w_j - m_j w_j}{U_{jj}}, \qquad w_k \leftarrow w_k - e\, U_{jk} \quad (k > j)

    and where the mask is not given, weights are kept for the largest :math:`w_{ij}^2 / U_{jj}^2`: in every group of an
    N:M pattern when the sweep reaches it, and for an unstructured one among all rows of 128 columns at a time.

    Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", algorithm 1.
    Columns go in blocks of 128 (a multiple of m); the columns beyond a block get its errors in one product.

    Args:
        weight: ``[R, C]``, float32; dead input features already zero.
        factor: U, float32 ``[C, C]``; see `damping.sweep_factor`.
        target: the pattern, or a bool keep mask ``[R, C]`` to hold on to.

    Returns:
        The new weight, float32, +0.0 where pruned; and the keep mask.

    Raises:
        ValueError: C is not a multiple of m.
    """
    columns = weight.shape[1]
    given = target.mT if isinstance(target, Tensor) else None
    group = target.m if isinstance(target, NM) else 1
    if columns % group:
        raise ValueError(f"in_features {columns} is not a multiple of {group}, as {target} wants")
    w = weight.mT.contiguous()  # columns as rows: what is read together lies together
    keep = torch.empty(w.shape, dtype=torch.bool)
    size = max(group, BLOCK // group * group)
    for start in range(0, columns, size):
        end = min(start + size, columns)
        u = factor[start:end, start:end]
        block, errors = w[start:end], torch.empty(end - start, w.shape[1])
        if given is not None:
            keep[start:end] = given[start:end]
        elif isinstance(target, Unstructured):
            pruned = _upto(target, end, w) - _upto(target, start, w)
            keep[start:end] = count_keep_mask(_saliency(block, u.diagonal()), pruned, "matrix")
        for j in range(end - start):
            if isinstance(target, NM) and j % group == 0:
                here = slice(j, j + group)
                keep[start:end][here] = nm_keep_mask(_saliency(block[here], u.diagonal()[here]).mT, target).mT
            errors[j] = block[j].masked_fill(keep[start + j], 0.0) / u[j, j]
            block[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
        w[end:] -= product(factor[start:end, end:].mT, errors)
    return torch.where(keep, w, 0.0).mT.contiguous(), keep.mT.contiguous()


def _saliency(w: Tensor, diagonal: Tensor) -> Tensor:
    """What the loss grows by when a weight goes, up to a factor."""
    return (w / diagonal[:, None]).square()


def _upto(target: Pattern, column: int, w: Tensor) -> int:
    """How many weights are pruned left of a column; so that the sum over the blocks is right to the weight."""
    return math.floor(target.sparsity * column * w.shape[1] + 0.5)
