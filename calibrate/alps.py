"""ALPS: weights and mask found together, as by ADMM, with a penalty that grows while the mask settles."""

import torch
from torch import Tensor

from .admm import select
from .damping import Spectrum
from .matmul import product
from .patterns import Group, Pattern, RowCounts

ITERATIONS = 30  # beyond that the published code stops as well once hardly a weight of the mask changes
PENALTY = 0.1
EVERY = 3
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""The penalty's factor where more than such a fraction of the kept weights were others the last time."""


def alps(
    weight: Tensor,
    hessian: Tensor,
    spectrum: Spectrum,
    target: Pattern | RowCounts | Tensor,
    *,
    per: Group = "matrix",
    iterations: int = ITERATIONS,
) -> tuple[Tensor, Tensor]:
    r"""Minimise the layer's error over weights with zeros, letting the zeros weigh more and more.

    With the dual variable V, the penalty :math:`\rho` and P the pattern's projection, from D = W_0 and V = 0:

    .. math::
        B &= \bigl(W_0 H - V + \rho D\bigr) (H + \rho I)^{-1} \\
        D &= P\bigl(B + V / \rho\bigr) \\
        V &\leftarrow V + \rho\,(B - D)

    and the result is D. A low penalty lets B, which has no zeros, do what is best for the layer, and the mask follows
    it; a high one brings B and D together. So it begins at 0.1 and every third step grows by 1.3, 1.2 or 1.1, the more
    the mask still changes, until nothing changes any more.

    Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", the
    penalty as in the published code. Left out: its second start with a lower one where the mask settles at once.

    Args:
        weight: W_0, ``[R, C]`` float32, scaled by the norms of its inputs.
        hessian: H, ``[C, C]`` float32, scaled to a diagonal of ones and damped.
        spectrum: eigenvalues and eigenvectors of the same, so that no step inverts a matrix.
        target: the pattern, how many every row prunes, or a bool keep mask ``[R, C]`` to hold on to.
        per: the weights that compete under an unstructured pattern.
        iterations: how many steps at most; 1 or more.

    Returns:
        The new scaled weight, +0.0 where pruned; and the keep mask.
    """
    pull = product(weight, hessian)
    vectors, values = spectrum.vectors, spectrum.values
    kept, dual, penalty = weight, torch.zeros_like(weight), PENALTY
    settled: Tensor | None = None
    for step in range(1, iterations + 1):
        turned = product(pull - dual + penalty * kept, vectors)
        w = product(turned / (values + penalty), vectors.mT)
        raised = w + dual / penalty
        keep = target if isinstance(target, Tensor) else select(raised.abs(), target, per)
        kept = torch.where(keep, raised, 0.0)
        dual = dual + penalty * (w - kept)
        if step % EVERY == 0:
            if settled is not None:
                changed = int((keep & ~settled).sum())
                if not changed:
                    break
                fraction = changed / int(keep.sum())
                penalty *= next(factor for least, factor in GROWTH if fraction > least)
            settled = keep
    return kept, keep
