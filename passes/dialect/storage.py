"""How the kept weights of an op are stored, and what that means for the activations they meet."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor

from ...calibrate.grid import Grid

Kind: TypeAlias = Literal["fp32", "fp16", "bf16", "int8", "int4"]

FLOATS: dict[torch.dtype, Kind] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""What the compiled module calls a float dtype."""

GROUPS = (32, 64, 128)
"""How many neighbouring columns may share an int4 scale."""


@dataclass(frozen=True)
class Storage:
    """The type of stored weights.

    Attributes:
        kind: ``fp32``, ``fp16``, ``bf16``; ``int8``, one float32 scale a row; ``int4``, one float16 scale a group.
        group: columns that share a scale; 0 unless ``int4``.
        half_scales: the scales of ``int8`` are float16, as a TensorRT engine takes them.
        blocked: a dense ``int8`` or ``int4`` weight, which ONNX Runtime's own operator multiplies (linear_codes.py): it
            quantises activations not token by token but a block of `block_of` columns at a time.

    Raises:
        ValueError: ``group`` does not go with ``kind``, or ``blocked`` with a float.
    """

    kind: Kind = "fp32"
    group: int = 0
    half_scales: bool = False
    blocked: bool = False

    def __post_init__(self) -> None:
        if self.blocked and not self.quantised:
            raise ValueError(f"only codes come in blocks, got {self.kind}")
        if self.kind == "int4" and self.group not in GROUPS:
            raise ValueError(f"int4 wants a group of 32, 64 or 128 columns, got {self.group}")
        if self.kind != "int4" and self.group != 0:
            raise ValueError(f"a group is for int4 only, got {self.group} with {self.kind}")

    @property
    def quantised(self) -> bool:
        """Whether weights are integer codes with scales, and activations are quantised too."""
        return self.kind in ("int8", "int4")

    @property
    def dtype(self) -> torch.dtype:
        """Of the values that are not quantised.

        Raises:
            KeyError: they are.
        """
        return {kind: dtype for dtype, kind in FLOATS.items()}[self.kind]

    @property
    def grid(self) -> Grid:
        """Of the values that are quantised.

        Raises:
            KeyError: they are not.
        """
        scales = torch.float16 if self.half_scales else torch.float32
        grids = {"int8": Grid(127, 0, scales), "int4": Grid(7, self.group, torch.float16)}
        return grids[self.kind]

    def activations(self, x: Tensor) -> Tensor:
        """Activations ``[..., K]`` as the coarsest of our kernels multiplies them, in x's dtype.

        The plain expression for this storage is a linear on these: bfloat16 weights meet activations that some
        kernels round to bfloat16, integer weights meet activations quantised per token.
        """
        if self.kind == "bf16":
            return x.bfloat16().to(x.dtype)
        if self.blocked:
            return quantise_blocks(x, self.block_of(x.shape[-1]))
        return quantise_tokens(x) if self.quantised else x

    def block_of(self, in_features: int) -> int:
        """How many columns of a ``blocked`` weight, and of its activations, share a scale as they are stored.

        A row of int8 has one scale, which is repeated for every block: the longest that fills it without padding.
        """
        return self.group or next((size for size in reversed(GROUPS) if in_features % size == 0), GROUPS[0])


FP32 = Storage()


def quantise_tokens(x: Tensor) -> Tensor:
    """Replace every token by its 8-bit codes times their step, as the ops with integer weights do.

    ``step = max|x| / 127`` in float32 and ``code = x / step`` rounded to nearest, ties to even. A step below the
    smallest normal float32 counts as 0. A token that holds an infinity or a NaN becomes NaN throughout.

    Args:
        x: ``[..., K]`` float; the codes are those of its float32 values.

    Returns:
        The same shape and dtype; in float64 the products are exact.
    """
    exact = x.float()
    if exact.shape[-1] == 0:
        return x.clone()
    step = exact.abs().amax(dim=-1, keepdim=True) / 127
    tiny = step < torch.finfo(torch.float32).tiny
    codes = torch.round(exact / step.masked_fill(tiny, 1.0))
    result = codes.to(x.dtype) * step.masked_fill(tiny, 0.0).to(x.dtype)
    return result.masked_fill(~exact.isfinite().all(dim=-1, keepdim=True), torch.nan)


def quantise_blocks(x: Tensor, block: int) -> Tensor:
    """As ``quantise_tokens``, with a step for every ``block`` columns of a token; the last may be short."""
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -columns % block))
    blocks = padded.reshape(*x.shape[:-1], padded.shape[-1] // block, block)
    return quantise_tokens(blocks).flatten(-2)[..., :columns]


def plain(weight: Tensor) -> Tensor:
    """A weight as the compiled module takes it: float32, contiguous, without a gradient."""
    return weight.detach().float().contiguous()


def tensor(array: NDArray[Any]) -> Tensor:
    """An array of the compiled module as a tensor, not copied."""
    return torch.from_numpy(array)
