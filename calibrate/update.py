"""Weights that make up for those that are pruned: the methods by name, and the error that they make smaller."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from .admm import admm
from .alps import alps
from .damping import Spectrum, damped_inverse, damped_spectrum, sweep_factor
from .masked_cg import masked_cg
from .matmul import product
from .patterns import Group, Pattern, RowCounts
from .sparsegpt import sweep
from .sums import total

Method: TypeAlias = Literal["sparsegpt", "admm", "cg", "admm-cg", "alps"]

DAMPING: Final[dict[Method, float]] = {"sparsegpt": 0.01, "admm": 0.1, "cg": 0.0, "admm-cg": 0.1, "alps": 0.01}
"""As published; conjugate gradients stop early instead."""
SEEN: Final = 1e-6
"""A direction was seen if its second moment is at least this fraction of the largest one: float32 rounds to less."""
CAUTION: Final = 0.01
"""What a weight that moves costs where calibration sees no effect of it; see `cost`."""


@dataclass(frozen=True)
class Inputs:
    """What a method knows about the inputs of a linear; the same for all linears that read them.

    Attributes:
        method: the method that it was made for.
        scale: ``[C]``: root mean square of every feature, up to one factor; a dead feature has a tiny one.
        hessian: ``[C, C]`` float32, scaled to a diagonal of ones; zeros for dead features.
        damped: the matrix that ADMM and ALPS work on.
        inverse: what ADMM needs inverted; None for the others.
        raised: the damping that it took, where that is more than was asked for; else 0.
        spectrum: of the damped matrix, for ALPS; None for the others.
        directions: how many directions the inputs have been seen in, where that is known, for ALPS; else None.
        factor: of the inverse, for SparseGPT; None for the others. See `damping.sweep_factor`.
    """

    method: Method
    scale: Tensor
    hessian: Tensor
    damped: Tensor
    inverse: Tensor | None
    raised: float = 0.0
    spectrum: Spectrum | None = None
    directions: int | None = None
    factor: Tensor | None = None


def prepare(hessian: Tensor, method: Method, damping: float | None = None) -> Inputs:
    """Invert, factor or decompose what a method needs so.

    Args:
        hessian: ``[C, C]`` float32, symmetric; see `hessian.Hessian`.
        method: the method.
        damping: what is added to the diagonal, as a fraction of its mean; None for the method's own.

    Raises:
        ValueError: see `damped_inverse` and `damped_spectrum`.
    """
    damping = DAMPING[method] if damping is None else damping
    dead = hessian.diagonal() == 0
    scale = hessian.diagonal().sqrt()
    scale = scale.clamp_min(1e-8 * float(scale.max()) or 1.0)  # dividing by it must not overflow
    scaled = hessian / scale / scale[:, None]
    if method == "sparsegpt":
        found = damped_inverse(hessian + torch.diag(dead.float()), damping)
        raised = found.damping if found.damping > damping else 0.0
        return Inputs(method, scale, scaled, scaled, None, raised, factor=sweep_factor(found.matrix))
    if method == "cg":
        return Inputs(method, scale, scaled, _damped(scaled, damping), None)
    # Ones for dead features on both sides of what is solved, or their weights would shrink.
    whole = scaled + torch.diag(dead.float())
    if method == "alps":
        spectrum = damped_spectrum(whole, damping)
        raised = spectrum.damping if spectrum.damping > damping else 0.0
        own = spectrum.values - spectrum.damping * float(whole.diagonal().double().mean())
        directions = int((own > SEEN * float(own[-1])).sum()) - int(dead.sum())
        return Inputs(method, scale, scaled, _damped(whole, spectrum.damping), None, raised, spectrum, directions)
    found = damped_inverse(whole, damping, shift=1.0)
    raised = found.damping if found.damping > damping else 0.0
    return Inputs(method, scale, scaled, _damped(whole, found.damping), found.matrix, raised)


def update(
    weight: Tensor, inputs: Inputs, target: Pattern | RowCounts | Tensor, *, per: Group, cautious: bool = False
) -> tuple[Tensor, Tensor]:
    """Prune a weight and change what is left of it, so that the layer's output changes least.

    Args:
        weight: ``[R, C]``, float32.
        inputs: from `prepare`.
        target: the pattern, or how many weights every row loses, and the method then chooses the mask; or a bool keep
            mask ``[R, C]``. Conjugate gradients want a mask, and SparseGPT takes no counts.
        per: the weights that compete under an unstructured pattern.
        cautious: let conjugate gradients work on the damped Hessian too, where that is not their own way.

    Returns:
        The new weight, float32, +0.0 where pruned; and the keep mask. What is kept of a dead feature stays as it was:
        nothing is known that it could be fitted to. (Algorithm 1 of SparseGPT drops such weights, kept or not.)

    Raises:
        ValueError: in_features is not a multiple of m.
    """
    alive = inputs.hessian.diagonal() > 0
    if inputs.method == "sparsegpt":
        assert inputs.factor is not None
        assert not isinstance(target, RowCounts)
        new, keep = sweep(weight * alive, inputs.factor, target)  # as zeros, dead features are pruned first
        return torch.where(keep & ~alive, weight, new), keep
    scaled = weight * inputs.scale
    if inputs.spectrum is not None:
        new, keep = alps(scaled, inputs.damped, inputs.spectrum, target, per=per)
    elif inputs.inverse is None:
        assert isinstance(target, Tensor)
        new, keep = scaled, target
    else:
        new, keep = admm(scaled, inputs.damped, inputs.inverse.float(), target, per=per)
    if inputs.method != "admm":
        new = masked_cg(scaled, inputs.damped if cautious or inputs.method == "cg" else inputs.hessian, keep, new)
    return torch.where(keep, torch.where(alive, new / inputs.scale, weight), 0.0), keep


def _damped(matrix: Tensor, damping: float) -> Tensor:
    """As `damped_inverse` and `damped_spectrum` damp it."""
    return matrix + damping * float(matrix.diagonal().double().mean()) * torch.eye(len(matrix))


def cost(weight: Tensor, original: Tensor, hessian: Tensor) -> float:
    r"""The relative error, and a little for every weight that moved: what decides whether an update is an improvement.

    .. math:: \frac{\operatorname{tr}\,D \bigl(H + \gamma \operatorname{diag} H\bigr) D^\top}
              {\operatorname{tr}\, W_0 H W_0^\top}, \quad D = W - W_0

    Few or repetitive tokens leave directions in which weights can grow without any error on them; other text has those
    directions. So the error alone would praise what ruins the model. See `CAUTION` for gamma.

    Args:
        weight: ``[R, C]`` float32.
        original: W_0, of the same shape.
        hessian: ``[C, C]`` float32.
    """
    return relative_error(weight, original, hessian, caution=CAUTION)


def relative_error(weight: Tensor, original: Tensor, hessian: Tensor, *, caution: float = 0.0) -> float:
    r"""How far a linear's output moved, relative to its size.

    .. math:: \frac{\operatorname{tr}\,(W - W_0) H (W - W_0)^\top}{\operatorname{tr}\, W_0 H W_0^\top}

    Args:
        weight: ``[R, C]`` float32.
        original: W_0, of the same shape.
        hessian: ``[C, C]`` float32.
        caution: by what fraction of itself the diagonal is raised for the error, not for the size.

    Returns:
        0.0 where the original output is zero throughout.
    """
    moved = weight - original
    size = total(product(original, hessian) * original)
    if size <= 0:
        return 0.0
    wrong = total(product(moved, hessian) * moved)
    if caution:
        wrong += caution * total(moved.square() * hessian.diagonal())
    return max(0.0, wrong / size)  # rounding may leave less than nothing
