"""The best weights under a mask, by conjugate gradients."""

import torch
from torch import Tensor

from .matmul import product

ITERATIONS = 10
EPSILON = torch.finfo(torch.float32).eps
SEVERAL = 16
"""How many roundings of the first residual are left of a last one that is none: with 1 a row of a flat Hessian stops or
not by the processor's order of sums (Zen 4 went on, a Xeon did not); 4 to 64 make no difference."""


def masked_cg(weight: Tensor, hessian: Tensor, keep: Tensor, start: Tensor, *, iterations: int = ITERATIONS) -> Tensor:
    r"""Minimise the layer's error over the weights that a mask keeps.

    .. math:: \min_W \operatorname{tr}\,(W - W_0) H (W - W_0)^\top
              \quad\text{with } W_{ij} = 0 \text{ where the mask is}

    Every row is a linear system of its own. All are solved together by conjugate gradients with the residual masked in
    every step: Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
    Models", section 3.2. A step never raises a row's error; a row that is done stands still. It is done when what is
    left of its residual is no more than rounding, which may point where the Hessian is flat: following that would
    make weights as large as one likes and gain nothing.

    Args:
        weight: ``[R, C]`` float32, W_0.
        hessian: ``[C, C]`` float32, positive semidefinite; converges fastest when its diagonal is all ones.
        keep: bool ``[R, C]``.
        start: where to begin, ``[R, C]``; what the mask prunes is ignored.
        iterations: how many steps.

    Returns:
        The new weight, +0.0 where pruned.
    """
    w = torch.where(keep, start, 0.0)
    residual = product(weight - w, hessian).masked_fill_(~keep, 0.0)
    rounding = SEVERAL * EPSILON * product((weight - w).abs(), hessian.abs()).masked_fill_(~keep, 0.0)
    least = rounding.square().sum(dim=1, keepdim=True)
    direction = residual
    size = residual.square().sum(dim=1, keepdim=True)
    for _ in range(iterations):
        moved = product(direction, hessian).masked_fill_(~keep, 0.0)
        curvature = (direction * moved).sum(dim=1, keepdim=True)
        flat = curvature <= EPSILON * direction.square().sum(dim=1, keepdim=True)
        step = torch.where(flat | (size <= least), 0.0, size / curvature)
        w = w + step * direction
        residual = residual - step * moved
        before, size = size, residual.square().sum(dim=1, keepdim=True)
        direction = residual + torch.where(before > 0, size / before, 0.0) * direction
    return w
