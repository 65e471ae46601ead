"""Dense shadows of sparse weights: what a mask is chosen from again while the weights are trained."""

from typing import Final

import torch
from torch import Tensor

from .admm import select
from .patterns import NM, RowCounts

FLOOR: Final = 1e-6
TINY: Final = 1e-30


def masked(shadow: Tensor, keep: Tensor) -> Tensor:
    r"""What the model runs with; the gradient by it is taken for that by the shadow, zeros included.

    .. math:: \widetilde W = M \odot W, \qquad
              \frac{\partial L}{\partial W} := \frac{\partial L}{\partial \widetilde W}

    (straight through: Bengio, Leonard and Courville 2013; for N:M Zhou et al. 2021, "Learning N:M Fine-grained
    Structured Sparse Neural Networks From Scratch".) So a weight that is pruned learns whether it is missed.

    Args:
        shadow: W, float ``[R, C]``.
        keep: M, bool ``[R, C]``.
    """
    return shadow + (torch.where(keep, shadow, 0.0) - shadow).detach()  # exact: w - w + w, or 0 - w + w


def choose(shadow: Tensor, target: NM | RowCounts, moment: Tensor | None = None) -> Tensor:
    r"""The mask that is nearest to the shadow: the largest of every group, or as many of every row as it keeps.

    With v, Adam's second moment, near is meant as the loss sees it, where v stands for the diagonal of Fisher's matrix
    (as ELSA weighs its projection; LeCun, Denker and Solla 1989, "Optimal Brain Damage"):

    .. math:: M = \arg\max_{M \in \mathcal{P}} \sum_{ij} M_{ij} s_{ij}, \qquad
              s = |W| \ \text{ or } \ s = |W| \odot \sqrt{v + \varepsilon \bar v}

    where a millionth of the mean keeps weights in order that nothing depends on.

    Args:
        shadow: W, float ``[R, C]``.
        target: the pattern, or how many every row prunes.
        moment: v, ``[R, C]``; None for the magnitude alone.

    Returns:
        Bool ``[R, C]``. Of equal weights those first in the row are kept.

    Raises:
        ValueError: the shadow or the moment holds NaN.
    """
    score = shadow.abs()
    if moment is not None:
        score = score * (moment + FLOOR * moment.mean() + TINY).sqrt()
    return select(score, target, "row")
