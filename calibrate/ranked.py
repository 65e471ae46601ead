"""Prune rows by rank, with a gradient for how many weights each row loses.

The order in which a row loses its weights is fixed before learning starts (BESA, Xu et al. 2024, "BESA: Pruning Large
Language Models with Blockwise Parameter-Efficient Sparsity Allocation", section 3.2): only the count is learned, so a
row is its ranks, and a mask is one comparison. While learning a weight costs at most 12 bytes beside itself: 2 or 4
for its rank, 4 for its masked value, 4 for the gradient of that. Probabilities are never stored.
"""

from typing import Any

import torch
from torch import Tensor

from . import gpu
from .masks import check_score
from .rates import staircase
from .sums import BLOCK


def ranks(score: Tensor) -> Tensor:
    """The place of every weight in the order in which its row is pruned.

    Args:
        score: ``[out_features, in_features]``, any float dtype; larger means keep. Compared in float32; of equal
            scores the higher index is pruned first, as in `masks.fraction_keep_mask`.

    Returns:
        ``[out_features, in_features]``, int16 up to 32,767 columns and int32 beyond: 0 is pruned first.

    Raises:
        ValueError: the score is not a matrix, or holds NaN.
    """
    check_score(score)
    rows, columns = score.shape
    dtype = torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32
    result = torch.empty(rows, columns, dtype=dtype)
    places = torch.arange(columns, dtype=dtype)
    size = max(1, BLOCK // max(1, columns))
    for part, out in zip(torch.split(score.detach(), size), torch.split(result, size), strict=True):
        order = columns - 1 - part.float().flip(1).argsort(dim=1, stable=True)
        out.scatter_(1, order, places.expand(len(part), -1))
    return result


def keep_mask(rank: Tensor, counts: Tensor) -> Tensor:
    """Prune the ``counts[i]`` first weights of row i.

    Args:
        rank: ``[out_features, in_features]`` of `ranks`.
        counts: integer ``[out_features]`` or ``[1]``, 0 to in_features.

    Returns:
        Bool ``[out_features, in_features]``.
    """
    return rank >= counts.to(rank.dtype)[:, None]  # the same dtype, or the ranks would be copied to the wider one


def prune(weight: Tensor, rank: Tensor, beta: Tensor, counts: Tensor) -> Tensor:
    r"""Prune ``counts`` weights of every row, as if each were pruned with the probability that ``beta`` gives it.

    With ranks r the weight ij is pruned with probability ``q``; the mask is hard, its gradient that of ``1 - q``
    (straight-through):

    .. math:: q_{ij} = \textstyle\sum_d \beta_{id} \, [r_{ij} < T_d], \quad
              y_{ij} = W_{ij} \, [r_{ij} \ge n_i], \quad
              \frac{\partial L}{\partial \beta_{id}} = -\sum_{j: r_{ij} < T_d} \frac{\partial L}{\partial y_{ij}} W_{ij}

    with the `rates.staircase` T. BESA, eq. 3 to 6, with the hard mask by count as in the published code; the paper's
    text prunes where ``q >= alpha``. The weight gets the gradient of what is kept.

    Args:
        weight: float ``[R, C]``.
        rank: ``[R, C]`` of `ranks`.
        beta: float ``[R, D]`` or ``[1, D]`` for all rows, D candidates.
        counts: integer ``[R]`` or ``[1]``; usually ``mean_rate(beta) * C``, rounded.

    Returns:
        Float ``[R, C]``.
    """
    result: Tensor = rate_mask(weight, rank, beta, counts)
    return result


@torch.library.custom_op("sparsify::rate_mask", mutates_args=())
def rate_mask(weight: Tensor, rank: Tensor, beta: Tensor, counts: Tensor) -> Tensor:
    """`prune` as an operator of torch, on the CPU and on GPUs (cuda/rate_mask.cu)."""
    return torch.where(keep_mask(rank, counts), weight, 0.0)


@rate_mask.register_fake
def _(weight: Tensor, rank: Tensor, beta: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(weight)


@torch.library.custom_op("sparsify::rate_mask_backward", mutates_args=())
def rate_mask_backward(
    grad: Tensor, weight: Tensor, rank: Tensor, counts: Tensor, beta_rows: int, candidates: int, for_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `prune` for the weight and for beta, float32; one that is not wanted is empty.

    ``beta_rows`` 0 and ``for_weight`` False are how a gradient is not wanted.
    """
    return (
        torch.where(keep_mask(rank, counts), grad, 0.0) if for_weight else grad.new_empty(0),
        _for_beta(weight, rank, grad, beta_rows, candidates) if beta_rows else grad.new_empty(0),
    )


@rate_mask_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, rank: Tensor, counts: Tensor, beta_rows: int, candidates: int, for_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(grad) if for_weight else grad.new_empty(0),
        grad.new_empty(beta_rows, candidates, dtype=torch.float32) if beta_rows else grad.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    """Keep the weight and the ranks, which exist anyway, and nothing else of their size."""
    weight, rank, beta, counts = inputs
    ctx.save_for_backward(weight, rank, counts)
    ctx.candidates, ctx.dtype = beta.shape, beta.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    weight, rank, counts = ctx.saved_tensors
    wants_weight, _, wants_beta, _ = ctx.needs_input_grad
    rows, candidates = ctx.candidates
    for_weight, for_beta = rate_mask_backward(
        grad, weight, rank, counts, rows if wants_beta else 0, candidates, wants_weight
    )
    return for_weight if wants_weight else None, None, for_beta.to(ctx.dtype) if wants_beta else None, None


rate_mask.register_autograd(_gradients, setup_context=_save)


@rate_mask.register_kernel("cuda")
def rate_mask_gpu(weight: Tensor, rank: Tensor, beta: Tensor, counts: Tensor) -> Tensor:
    """`rate_mask` on CUDA tensors."""
    weight = weight.detach().contiguous()
    out = torch.empty_like(weight)
    with gpu.kernels(weight) as (cuda, stream):
        cuda.rate_mask_forward(weight, rank, counts.int(), out, stream)
    return out


@rate_mask_backward.register_kernel("cuda")
def rate_mask_backward_gpu(
    grad: Tensor, weight: Tensor, rank: Tensor, counts: Tensor, beta_rows: int, candidates: int, for_weight: bool
) -> tuple[Tensor, Tensor]:
    """`rate_mask_backward` on CUDA tensors."""
    grad, weight = grad.detach().contiguous(), weight.detach().contiguous()
    wanted = torch.empty_like(grad) if for_weight else None  # contiguous, as grad is
    beta = grad.new_empty(beta_rows, candidates, dtype=torch.float32) if beta_rows else None
    together = beta_rows == 1 and len(weight) != 1
    workspace = grad.new_empty(len(weight), candidates, dtype=torch.float32) if together else None
    with gpu.kernels(grad) as (cuda, stream):
        cuda.rate_mask_backward(weight, rank, counts.int(), grad, wanted, beta, workspace, stream)
    return grad.new_empty(0) if wanted is None else wanted, grad.new_empty(0) if beta is None else beta


def _for_beta(weight: Tensor, rank: Tensor, grad: Tensor, groups: int, count: int) -> Tensor:
    """``dL/dbeta`` of `prune`: products summed by stair, then over the stairs below each candidate.

    Rows go in blocks, so that the stair of every weight, which torch wants as int64, exists for one block only.
    """
    rows, columns = weight.shape
    edges = staircase(columns, count - 1)
    stair = torch.bucketize(torch.arange(columns), edges, right=True)  # the first candidate that prunes this rank
    size = max(1, BLOCK // max(1, columns))
    found = []
    for w, r, g in zip(*(torch.split(t, size) for t in (weight, rank, grad)), strict=True):
        sums = torch.zeros(len(w), count)
        sums.scatter_add_(1, stair[r.int()], g.float() * w.float())
        found.append(sums)
    sums = torch.cat(found) if rows else torch.zeros(0, count)
    if groups == 1:
        sums = sums.sum(dim=0, keepdim=True, dtype=torch.float64)
    return -sums.cumsum(dim=1)
