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
TOKENS = 4
"""How many tokens a model is asked about."""
MARGIN = 1e-3
"""What a sum in another order may change, by far, and what a model reads or where it is may not."""


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
            raise InputError(f"its layers keep a state that is not a KV cache ({', '.join(kinds)})")
        held.append((layer.keys, layer.values))
    return held


def cache_shapes(model: nn.Module) -> tuple[tuple[int, int, int], ...]:
    """Ask the model itself, by running one token, what its cache looks like.

    Returns:
        ``(kv_heads, head_dim of keys, head_dim of values)`` of each layer that keeps one; none where no layer does.

    Raises:
        InputError: the model keeps another state, or cannot be run.
    """
    name = type(model).__name__
    one = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        _logits(model, one)  # what fails here has nothing to do with the cache
        argument = cache_argument(model)
        if argument is None:
            raise InputError(f"{name} keeps a state that is not a KV cache: its forward takes no cache")
        cache = cache_of([])
        try:
            model(input_ids=one, use_cache=True, **{argument: cache})
        except Exception as error:  # a model that looks for its own state in the cache raises what it likes
            why = f"{type(error).__name__}: {error}"
            raise InputError(f"{name} keeps a state that is not a KV cache: {why}") from error
    return tuple((keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in held_by(cache))


def looks_ahead(model: nn.Module) -> bool:
    """Whether what follows a token changes what the model says of it; such a one fills a cache, but cannot decode."""
    ids = torch.arange(3, 3 + TOKENS)[None]
    with torch.no_grad():
        whole, part = (_logits(model, ids[:, :n])[:, 0] for n in (TOKENS, 1))
    return bool((whole - part).abs().max() > MARGIN * whole.abs().max())


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    try:
        logits: Tensor = model(input_ids=ids, **uses_no_cache(model)).logits
    except Exception as error:  # a model's own code raises what it likes
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{type(model).__name__} cannot be run on {ids.shape[1]} tokens: {why}") from error
    return logits


def uses_no_cache(model: nn.Module) -> dict[str, bool]:
    """What tells ``model.forward`` to keep no cache or state; nothing where it knows none."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def empty_past(
    cache: tuple[tuple[int, int, int], ...], batch: int, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """A past of length 0 for every cache layer: ``[batch, kv_heads, 0, head_dim]``."""
    return [(torch.zeros(batch, h, 0, k, dtype=dtype), torch.zeros(batch, h, 0, v, dtype=dtype)) for h, k, v in cache]
