"""Float32 matrix products on the CPU through oneDNN, which uses wider instructions than torch's default does."""

from typing import Any

import torch
from torch import Tensor

_FAST = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""As ``torch.nn.functional.linear``, several times faster for float32 on x86 with AVX-512; differentiable.

    .. math:: y = x W^\top + b

    Torch gives float32 products to MKL, which on many processors stays at AVX2. Other dtypes, other devices and torch
    builds without the oneDNN operator get torch's own. The result is the same for any number of threads as long as
    the summed axis is not far longer than the others together; sums over tokens are therefore cut into pieces.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]``.
    """
    float32 = x.dtype == weight.dtype == torch.float32
    if not (_FAST and float32 and x.is_cpu and weight.is_cpu and x.numel() and weight.numel()):
        return torch.nn.functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two matrices, ``[R, K]`` and ``[K, C]``, by `linear`."""
    return linear(a, b.mT)


class _Linear(torch.autograd.Function):
    """The operator, with gradients that are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        by_x = _product(grad, weight.mT, None) if wants_x else None
        by_weight = _product(rows.mT, x.reshape(-1, x.shape[-1]).mT, None) if wants_weight else None
        return by_x, by_weight, rows.sum(dim=0) if wants_bias else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Copies: for views with gaps oneDNN has no fast kernel, and takes one that is thirty times slower.
    x, weight = x.contiguous(), weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
