"""A pruned layer, the scales of its weight, and what rounding makes of it."""

import torch
from sparsify_export.calibrate.grid import largest, quantise, scales, search_strengths, spread


def layer(rows=6, columns=40, seed=0, kept=0.5):
    """A pruned weight, its mask, and the Hessian of inputs of different sizes, of which a third would tell most."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns // 3, generator=generator) @ torch.randn(
        columns // 3, columns, generator=generator
    )
    x = (x + torch.randn(3 * columns, columns, generator=generator)) * torch.logspace(-0.5, 0.5, columns)
    keep = torch.rand(rows, columns, generator=generator) < kept
    return torch.randn(rows, columns, generator=generator) * keep, keep, (2 / len(x)) * x.mT @ x


def scale_of(weight, hessian, grid):
    return scales(largest(weight, grid), search_strengths(weight, hessian.diagonal(), grid), grid)


def nearest(weight, scale, grid):
    return quantise(weight, spread(scale, weight.shape[1], grid), grid)
