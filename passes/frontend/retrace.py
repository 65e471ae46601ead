"""Trace a model again in the dtype that its engine computes in, with the weights that were pruned in float32."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..fx.canonical import canonicalise
from .load import Pretrained
from .trace import Traced, trace


def retrace(
    pretrained: Pretrained,
    params: Mapping[str, Tensor],
    dtype: torch.dtype,
    example: Mapping[str, Tensor] | None = None,
) -> Traced:
    """Trace ``pretrained`` as transformers would run it in ``dtype``; what it computes in float32 it still does.

    Parameters are cast, buffers (the frequencies of rotary embeddings) stay as they are. The new graph has the same
    weights by the same names, so each is taken from ``params``, rounded once, with -0.0 made +0.0: TensorRT looks for
    literal zeros, and rounding makes negative ones out of the smallest weights.

    Args:
        pretrained: the model; its parameters are cast in place.
        params: weights by their key in the canonical float32 program.
        dtype: float16, bfloat16 or float32.
        example: see ``trace``.

    Returns:
        The traced model, canonical.

    Raises:
        InputError: a weight does not fit the dtype, or the model cannot be traced in it.
    """
    for parameter in pretrained.model.parameters():
        parameter.data = parameter.data.to(dtype)
    traced = trace(pretrained, example, any_length=False)
    canonicalise(traced.program)
    state = traced.program.state_dict
    for key, value in state.items():
        if value.dtype == dtype:
            state[key] = torch.nn.Parameter(_rounded(key, params[key], dtype), requires_grad=False)
    return traced


def _rounded(key: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = weight.detach().to(dtype) + 0.0
    if not bool(rounded.isfinite().all()):
        name = str(dtype).removeprefix("torch.")
        raise InputError(f"{key} holds {float(weight.abs().max()):g}, which {name} cannot hold; give --dtype bf16")
    return rounded
