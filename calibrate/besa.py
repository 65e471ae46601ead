"""What BESA's rates are learned from: how far the block's output moves, and how far its sparsity is off."""

from torch import Tensor


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
