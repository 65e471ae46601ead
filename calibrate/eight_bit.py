"""Activations of 8 bits with one scale that is fixed beforehand: what rounding does to them, and which scale to take.

Both kinds are symmetric: a number is a code times the scale, and the zero point is 0.
"""

from typing import Final, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

Kind: TypeAlias = Literal["int8", "fp8"]
"""Whole codes from -128 to 127; or numbers of 4 exponent and 3 mantissa bits, E4M3FN, whose largest is 448."""

LARGEST: Final = {"int8": 127.0, "fp8": 448.0}
"""The code that the largest activation gets where nothing is clipped."""
SMALLEST_SCALE: Final = 2.0**-24
"""The smallest positive float16."""
STRENGTHS: Final = tuple(2 ** (-step / 8) for step in range(65))
"""Fractions of the largest activation that `Magnitudes.scale` tries to clip at."""

_INFINITY = 0x7C00  # the bits of a float16; those of NaN are above
_CHUNK = 1 << 20  # elements whose bits exist at one time


def codes(x: Tensor, scale: Tensor | float, kind: Kind) -> Tensor:
    r"""The codes of numbers, as ONNX's QuantizeLinear gives them.

    .. math:: q = \operatorname{sat}(\lfloor x / s \rceil)

    To nearest, ties to even, what is out of range to its end; computed in float32.

    Args:
        x: any float dtype and shape.
        scale: one number, or what broadcasts.
        kind: of the codes.

    Returns:
        int8 or float8_e4m3fn, of x's shape. Zero is +0.
    """
    steps = x.float() / scale
    if kind == "int8":
        return steps.round().clamp(-128, 127).to(torch.int8)
    # A small negative number becomes -0, which is no zero to a sparse kernel; adding +0.0 mends it.
    rounded = steps.clamp(-LARGEST[kind], LARGEST[kind]).to(torch.float8_e4m3fn).float() + 0.0
    return rounded.to(torch.float8_e4m3fn)


def rounded(x: Tensor, scale: float, kind: Kind) -> Tensor:
    """The codes of activations times their scale, in x's dtype: QuantizeLinear and then DequantizeLinear."""
    return (codes(x, scale, kind).float() * scale).to(x.dtype)


class Magnitudes:
    """Counts how often every float16 magnitude occurs among the activations of some calibration tokens.

    Counts are whole numbers, so they do not depend on the order in which anything is added.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(1 << 15, dtype=torch.int64)

    def update(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """Count the tokens of one batch.

        Args:
            x: ``[..., K]``, any float dtype; it is rounded to float16.
            token_mask: ``[...]`` as ``x`` without its last axis; zero or False leaves a token out. None counts all.

        Raises:
            ValueError: a counted token holds NaN, or more than float16 can. Nothing is counted then.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if token_mask is not None:
            rows = rows[token_mask.reshape(-1).bool()]
        counts = torch.zeros_like(self._counts)
        for chunk in torch.split(rows.reshape(-1), _CHUNK):
            bits = chunk.half().view(torch.int16) & 0x7FFF
            counts += torch.bincount(bits, minlength=len(counts))
        if bad := int(counts[_INFINITY:].sum()):
            raise ValueError(f"{bad} activations are NaN, infinite, or more than the 65504 that float16 holds")
        self._counts += counts

    def scale(self, kind: Kind, strengths: tuple[float, ...] = STRENGTHS) -> float:
        r"""The scale with the least squared error, among those that clip at some fraction of the largest activation.

        .. math:: s = \gamma \max|x| / q_{\max}, \qquad \min_\gamma \sum_x (s\,q(x) - x)^2

        Args:
            kind: of the codes.
            strengths: values of gamma to try; of equally good ones the first is taken.

        Returns:
            A positive float16 number.

        Raises:
            ValueError: no token was counted, or all activations are zero.
        """
        present = np.flatnonzero(self._counts.numpy())
        if len(present) == 0:
            raise ValueError("no calibration token reached this layer, so the scale of its activations is unknown")
        values = torch.from_numpy(present.astype(np.uint16).view(np.float16).astype(np.float32))
        top = float(values[-1])
        if top == 0:
            raise ValueError("its activations are all zero on the calibration batches, so they have no scale")
        often = self._counts.numpy()[present].astype(np.float64)
        best, least = 0.0, float("inf")
        for strength in strengths:
            scale = max(float(np.float16(top * strength / LARGEST[kind])), SMALLEST_SCALE)
            wrong = rounded(values, scale, kind).numpy().astype(np.float64) - values.numpy()
            error = float((often * wrong**2).sum())  # numpy adds in one thread
            if error < least:
                best, least = scale, error
        return best
