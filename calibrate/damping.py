"""Inverses and spectra of damped Hessians; the damping rises until the matrix is positive definite."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

HIGHEST = 10.0
"""Damping beyond which there is no hope: the matrix is no second moment then."""


@dataclass(frozen=True)
class Inverse:
    """The inverse of a damped matrix.

    Attributes:
        matrix: float64 ``[C, C]``.
        damping: the damping that it took.
    """

    matrix: Tensor
    damping: float


@dataclass(frozen=True)
class Spectrum:
    """A damped matrix as its eigenvalues and eigenvectors: ``vectors * values @ vectors.T``.

    Attributes:
        values: float32 ``[C]``, all positive, ascending.
        vectors: float32 ``[C, C]``, one in a column.
        damping: the damping that it took.
    """

    values: Tensor
    vectors: Tensor
    damping: float


def damped_inverse(hessian: Tensor, damping: float, *, shift: float = 0.0) -> Inverse:
    r"""Invert a Hessian with a multiple of the identity added.

    .. math:: \Bigl(H + \bigl(\lambda \cdot \overline{\operatorname{diag} H} + s\bigr) I\Bigr)^{-1}

    If the Cholesky factorisation fails, the damping ``lambda`` goes up tenfold (from 0 to 1e-4) and it is tried again.
    Computed in float64 on one thread, so that no bit hangs on the number of threads.

    Args:
        hessian: ``[C, C]``, symmetric.
        damping: ``lambda``, 0 or more.
        shift: ``s``, what else is added to the diagonal.

    Raises:
        ValueError: not positive definite at a damping of 10, or ``damping`` is negative.
    """
    if not damping >= 0:
        raise ValueError(f"damping wants 0 or more, got {damping}")
    mean = float(hessian.diagonal().double().cpu().mean())
    tried = damping
    while True:
        damped = hessian.double()
        damped.diagonal().add_(tried * mean + shift)
        with one_thread():
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not int(failed):
                inverse = torch.cholesky_inverse(factor)
                if bool(inverse.diagonal().isfinite().all()):
                    return Inverse(inverse, tried)
        tried = _more(tried, first=damping)


def sweep_factor(inverse: Tensor) -> Tensor:
    r"""What a sweep over the columns divides and hands on errors by: U, upper triangular.

    .. math:: H^{-1} = U^\top U

    In float64 on one thread, as `damped_inverse`.

    Args:
        inverse: float64 ``[C, C]``, the inverse of the damped Hessian.

    Returns:
        float32 ``[C, C]``; the same for all weights that read the same inputs.
    """
    with one_thread():
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def damped_spectrum(hessian: Tensor, damping: float) -> Spectrum:
    r"""Decompose a Hessian with a multiple of the identity added.

    .. math:: H + \lambda \cdot \overline{\operatorname{diag} H} \, I = Q \Lambda Q^\top

    If an eigenvalue is not positive, ``lambda`` goes up as in `damped_inverse`. In float64 on one thread, so that no
    bit hangs on the number of threads.

    Args:
        hessian: ``[C, C]``, symmetric.
        damping: ``lambda``, 0 or more.

    Raises:
        ValueError: not positive definite at a damping of 10, not finite, or ``damping`` is negative.
    """
    if not damping >= 0:
        raise ValueError(f"damping wants 0 or more, got {damping}")
    if not bool(hessian.isfinite().all()):
        raise ValueError("the Hessian is not finite; look for infinities in the calibration activations")
    mean = float(hessian.diagonal().double().cpu().mean())
    with one_thread():
        values, vectors = torch.linalg.eigh(hessian.double())
    tried = damping
    while not float(values[0]) + tried * mean > 0:
        tried = _more(tried, first=damping)
    return Spectrum((values + tried * mean).float(), vectors.float(), tried)


def _more(tried: float, *, first: float) -> float:
    """The next damping to try.

    Raises:
        ValueError: there is none.
    """
    if 10 * tried > HIGHEST:
        raise ValueError(f"the Hessian is not positive definite with any damping from {first:g} to {tried:g}")
    return max(10 * tried, 1e-4)


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK splits its sums by the number of threads; inside here it has one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
