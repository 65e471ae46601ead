"""Stacks of experts as one op each while a model is traced, whichever way transformers would run them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

WAY = "sparsify_export"
"""What our way of running experts is called in a configuration."""


@torch.library.custom_op("sparsify::stacked_linear", mutates_args=())
def stacked_linear(x: Tensor, ids: Tensor, stack: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Every row of x times the matrix of a stack that it asks for: ``y[s] = x[s] W_e^T + b_e``, ``e = ids[s]``.

    Args:
        x: ``[S, K]``.
        ids: ``[S]`` int64, 0 .. E-1.
        stack: ``[E, N, K]``, or ``[E, K, N]`` where ``transposed``.
        bias: ``[E, N]`` or None.
        transposed: which of the two.

    Returns:
        ``[S, N]``.
    """
    weights = stack if transposed else stack.mT
    y = x.new_zeros(len(x), weights.shape[2])
    for expert in sorted(set(ids.tolist())):
        mine = ids == expert
        y[mine] = x[mine] @ weights[expert] + (0 if bias is None else bias[expert])
    return y


@stacked_linear.register_fake
def _(x: Tensor, ids: Tensor, stack: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], stack.shape[2 if transposed else 1])


@contextmanager
def experts_as_ops(model: Any) -> Iterator[None]:
    """Inside, what transformers dispatches by ``_experts_implementation`` runs its products by ``stacked_linear``.

    Left alone: classes that do not ask, such as Llama 4's, whose products of all experts are ``bmm`` in the graph.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = {key: getattr(config, "_experts_implementation", None) for key, config in configs.items()}
    ALL_EXPERTS_FUNCTIONS.register(WAY, experts_forward)
    for config in configs.values():
        config._experts_implementation = WAY
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What a module of experts computes, in the words of transformers' own ``batched_mm_experts_forward``.

    Args:
        module: with ``gate_up_proj`` or ``up_proj``, ``down_proj``, and what ``use_experts_implementation`` says of
            them.
        hidden_states: ``[T, hidden]``.
        top_k_index: ``[T, k]``, the experts of each token.
        top_k_weights: ``[T, k]``, how much each counts.

    Returns:
        ``[T, hidden]``.
    """
    tokens, chosen = top_k_index.shape
    x = hidden_states.unsqueeze(1).expand(-1, chosen, -1).reshape(tokens * chosen, hidden_states.shape[-1])
    ids = top_k_index.reshape(-1)

    def product(x: Tensor, name: str) -> Tensor:
        stack, bias = getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None
        return torch.ops.sparsify.stacked_linear(x, ids, stack, bias, module.is_transposed)  # type: ignore[no-any-return]

    gated = module.has_gate
    inner = module._apply_gate(product(x, "gate_up_proj")) if gated else module.act_fn(product(x, "up_proj"))
    y = product(inner, "down_proj")
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    weighted = y * top_k_weights.reshape(-1, 1)
    return weighted.reshape(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)
