"""What BESA's rates are learned from: how far the block's output moves, and how far its sparsity is off."""

import math
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor

from .patterns import NM

LEAST_STEPS: Final = 128
"""Steps of BESA's published runs: 128 sequences, one at a time."""


@dataclass(frozen=True)
class Learning:
    """How rates are learned.

    Attributes:
        per: one distribution over rates a row, one for all rows of a linear, or one over ``patterns`` a linear.
        reference: what the block's output is compared with: the dense block on the ``pruned`` path's inputs (BESA's
            row-wise results), or the ``dense`` model's (its layer-wise results), which also makes up for the blocks
            before.
        optimiser: AdamW, or Prodigy, which needs no step size but a ``growth``.
        step_size: of AdamW, falling to 0 along a straight line; 0.01 and constant in the published code.
        growth: of Prodigy's estimate; 0.05 to 50 in BESA's published commands.
        width: of the bell around the target that the logits start from; None for uniform, as published.
        bounded: put the logits through a sigmoid first, as published; rates then stay within 0.376 and 0.624.
        rate_steps: candidate rates less one.
        penalty: weight of the sparsity penalty.
        epochs: times that every sequence is used; more where that gives fewer than 128 steps.
        patterns: what a linear can become; None is dense.

    Raises:
        ValueError: a number is not positive.
    """

    per: Literal["row", "layer", "pattern"] = "row"
    reference: Literal["pruned", "dense"] = "pruned"
    optimiser: Literal["adamw", "prodigy"] = "adamw"
    step_size: float = 0.1
    growth: float = 5.0
    width: float | None = 0.1
    bounded: bool = False
    rate_steps: int = 100
    penalty: float = 5.0
    epochs: int = 1
    patterns: tuple[NM | None, ...] = (NM(4, 8), NM(2, 4), NM(1, 4), None)

    def __post_init__(self) -> None:
        numbers = {
            "step_size": self.step_size,
            "growth": self.growth,
            "rate_steps": self.rate_steps,
            "penalty": self.penalty,
            "epochs": self.epochs,
            "width": 1.0 if self.width is None else self.width,
        }
        for name, value in numbers.items():
            if not value > 0:
                raise ValueError(f"{name} wants more than 0, got {value}")

    def steps(self, sequences: int) -> int:
        """Steps over so many sequences."""
        return max(self.epochs, math.ceil(LEAST_STEPS / sequences)) * sequences


def channel_scale(wanted: Tensor) -> Tensor:
    """Squared norm of every channel of a block's output ``[..., hidden]`` over its tokens, float32 ``[hidden]``."""
    return wanted.detach().float().square().reshape(-1, wanted.shape[-1]).sum(dim=0)


def output_loss(got: Tensor, wanted: Tensor, token_mask: Tensor | None = None) -> Tensor:
    r"""Mean over the channels of the relative squared error of a block's output.

    .. math:: \frac1H \sum_c \frac{\lVert Y_{:c} - \tilde Y_{:c} \rVert^2}{\lVert Y_{:c} \rVert^2}

    Xu et al. 2024, "BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation", eq. 1,
    with the scale of each channel as in the published code. A channel that is always zero counts its error unscaled.

    Args:
        got: output of the pruned block, ``[..., H]``.
        wanted: output of the dense block.
        token_mask: bool ``[...]``; False leaves a token out.

    Returns:
        A float32 number; differentiable in ``got``.
    """
    off = (got - wanted).float()
    if token_mask is not None:
        off = off * token_mask[..., None]
        wanted = wanted * token_mask[..., None]
    scale = channel_scale(wanted)
    off = off.square().reshape(-1, off.shape[-1]).sum(dim=0)
    return (off / scale.masked_fill(scale == 0, 1.0)).mean()


def rate_loss(rate: Tensor, target: float) -> Tensor:
    r"""Penalty for a block whose sparsity is off: ``((rate - target) / target)^2``, as in BESA's published code."""
    return ((rate - target) / target) ** 2
