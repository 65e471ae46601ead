"""The KV cache of transformers as plain tensors: what it is called, how one is made from tensors, an empty one.

Versions differ. Up to 5.23 ``forward`` calls it ``past_key_values``, from 5.24 on ``cache``; a model whose code came
with its checkpoint may have kept the older name. Every version changes the cache that is handed in in place, so results
are read from it and not from a field of the output.
"""

import inspect

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..errors import InputError

NAMES = ("cache", "past_key_values")  # newest first


def cache_argument(model: nn.Module) -> str | None:
    """The name under which ``model.forward`` takes a KV cache, or None where it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def cache_of(past: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache that holds ``past``: keys and values of each layer, ``[batch, kv_heads, past, head_dim]``.

    It is built without a configuration: with one, layers of a sliding window drop entries and decoding goes wrong.
    """
    cache = DynamicCache()
    for keys, values in past:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def held_by(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer of ``cache``.

    Raises:
        InputError: a layer holds something else, as recurrent and sliding layers do.
    """
    held = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            kinds = sorted({type(layer).__name__ for layer in cache.layers})
            raise InputError(f"this model keeps a state that is not a KV cache ({', '.join(kinds)})")
        held.append((layer.keys, layer.values))
    return held


def empty_past(
    cache: tuple[tuple[int, int, int], ...], batch: int, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """A past of length 0 for every cache layer: ``[batch, kv_heads, 0, head_dim]``."""
    return [(torch.zeros(batch, h, 0, k, dtype=dtype), torch.zeros(batch, h, 0, v, dtype=dtype)) for h, k, v in cache]
