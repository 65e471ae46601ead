"""Sums of large float32 matrices: added up in float64, in blocks, so that they cost no second matrix.

Torch adds in an order that can change with the number of threads. In float64 that changes about the 16th digit, so
a sum that is rounded to float32 before anything is decided by it comes out the same on any machine.
"""

import math

import torch

BLOCK = 1 << 20  # elements: 8 MB in float64


def blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut ``[R, C]`` into views of whole rows, one block each or one row if that is more; never no view at all."""
    return torch.split(matrix, max(1, BLOCK // max(1, matrix.shape[1])))


def column_sums(matrix: torch.Tensor) -> torch.Tensor:
    """Sum ``[R, C]`` over its rows; float64 ``[C]``."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for block in blocks(matrix):
        total += block.sum(dim=0, dtype=torch.float64)
    return total


def row_sums(matrix: torch.Tensor) -> torch.Tensor:
    """Sum ``[R, C]`` over its columns; float64 ``[R]``."""
    return torch.cat([block.sum(dim=1, dtype=torch.float64) for block in blocks(matrix)])


def total(matrix: torch.Tensor) -> float:
    """Sum all of ``[R, C]``."""
    return math.fsum(row_sums(matrix).tolist())
