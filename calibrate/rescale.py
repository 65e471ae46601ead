"""The scales that suit given codes best, all those of a row at once."""

import torch
from torch import Tensor

from .damping import one_thread
from .grid import Grid, spread
from .matmul import product

ROWS = 256  # rows whose matrices A are in memory together
RIDGE = 1e-6  # of the mean diagonal of A, which is singular where codes of two groups make the same


def rescale(weight: Tensor, hessian: Tensor, value: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    r"""Move the scales to where the layer's output changes least, the codes standing still.

    The error of a row is a parabola in its scales s. With the codes c, and g and h for groups of columns,

    .. math:: \min_s \; (s \odot c - w)^\top H (s \odot c - w): \qquad A s = b, \quad
              A_{gh} = c_g^\top H_{gh}\, c_h, \quad b_g = c_g^\top (H w)_g

    Codes and scales in turns are from Zhang et al. 2025, "COMQ: A Backpropagation-Free Algorithm for Post-Training
    Quantization", who move one number at a time; `quantise.descend` is the turn of the codes.

    Args:
        weight: ``[R, C]`` float32, w: what is to be reproduced.
        hessian: ``[C, C]`` float32, positive semidefinite.
        value: ``[R, C]``, on the grid: s times c.
        scale: ``[R, G]`` of `grid.scales`, those of ``value``.
        grid: the grid.

    Returns:
        float32 ``[R, G]``, rounded as they are stored; those of before in rows that would not gain, and for groups that
        have no codes or would get a scale that is not positive.
    """
    pieces = zip(*(torch.split(x, ROWS) for x in (weight, value, scale)), strict=True)
    return torch.cat([_rescale(w, hessian, v, s, grid) for w, v, s in pieces])


def _rescale(weight: Tensor, hessian: Tensor, value: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    rows, columns = weight.shape
    group = grid.group or columns
    steps = spread(scale, columns, grid)
    codes = (value / torch.where(steps > 0, steps, 1.0)).round()
    slope = product(weight - value, hessian)  # half of minus the gradient, by weights
    downhill = _by_group(codes * slope, group).double()
    a = torch.empty(rows, scale.shape[1], scale.shape[1], dtype=torch.float64)
    for index, start in enumerate(range(0, columns, group)):
        inside = slice(start, start + group)
        a[..., index] = _by_group(codes * product(codes[:, inside], hessian[inside]), group)
    size = a.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * size.mean(dim=1, keepdim=True) + (size == 0)
    with one_thread():
        step = torch.linalg.solve(a + torch.diag_embed(ridge), downhill)
    moved = (scale + step).float().to(grid.dtype).float()
    moved = torch.where((moved > 0) & moved.isfinite() & (size > 0), moved, scale)
    step = (moved - scale).double()
    gain = (step * (2 * downhill - (a @ step[..., None])[..., 0])).sum(dim=1)
    return torch.where(gain[:, None] > 0, moved, scale)


def _by_group(products: Tensor, group: int) -> Tensor:
    """Sums of ``[R, C]`` over each group of columns, ``[R, G]``."""
    padded = torch.nn.functional.pad(products, (0, -products.shape[1] % group))
    return padded.reshape(len(padded), padded.shape[1] // group, group).sum(dim=-1)
