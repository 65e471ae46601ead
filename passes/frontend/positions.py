"""How a model counts positions: where it begins, how far it goes, and up to where its rotary tables stay the same."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .kv_cache import MARGIN, TOKENS, uses_no_cache


def reserved(model: Any) -> int:
    """Rows in front of the position table that no token has: RoBERTa's positions follow that of its padding."""
    rows = getattr(model.config, "max_position_embeddings", None)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not _words(model)]
    found = [m.padding_idx + 1 for m in tables if m.num_embeddings == rows and m.padding_idx is not None]
    return max(found, default=0)


def _words(model: Any) -> Any:
    """The table of words; None of a model that has several, or none."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def longest(model: Any) -> int | None:
    """Tokens of a text at most, as configuration and position table say; None where they say nothing."""
    said = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [
        said - reserved(model) if said and said > 0 else None,
        steady_until(model) if model.can_generate() else None,
    ]
    return min((limit for limit in limits if limit), default=None)


def first_position(model: Any) -> int | None:
    """The number of a text's first position, or None where the model takes no positions.

    The model is asked: its own forward, which is told none, has to agree with one that is told.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.tensor([[i for i in range(TOKENS + 1) if i != padding][:TOKENS]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    own = model(**given).logits
    candidates = [0] if padding is None else [0, padding + 1]
    told = {start: model(**given, position_ids=start + torch.arange(TOKENS)[None]).logits for start in candidates}
    return min(told, key=lambda start: float((told[start] - own).abs().max()))


def bears_padding(model: Any) -> bool:
    """Whether padding in front of a text leaves a decoder what it is; the model is asked.

    Learned positions that count from the start of the row, as BART's do, give a text others behind padding.
    """
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.tensor([[i for i in range(TOKENS + 1) if i != padding][:TOKENS]])
    padded = torch.cat([torch.full((1, TOKENS), padding or 0), ids], dim=1)
    mask = torch.cat([torch.zeros_like(ids), torch.ones_like(ids)], dim=1)
    with torch.no_grad():
        places = {}
        if (first := first_position(model)) is not None:
            places = {"position_ids": first + (mask.cumsum(-1) - 1).clamp(min=0)}
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), **uses_no_cache(model)).logits
        behind = model(input_ids=padded, attention_mask=mask, **uses_no_cache(model), **places).logits[:, TOKENS:]
    return not bool(((alone - behind).abs() > MARGIN * alone.abs().max()).any())


def windows_of(model: Any) -> list[int]:
    """The sliding windows of a model's attention, shortest first, as its configuration says."""
    config = model.config.get_text_config()
    found = {getattr(config, name, None) for name in ("sliding_window", "window_size")}
    return sorted(size for size in found if isinstance(size, int) and size > 1)


def steady_until(model: Any) -> int | None:
    """Tokens up to which rotary tables do not depend on the length of the text; None where they never do."""
    return min((until for *_, until in _changing(model)), default=None)


@contextmanager
def steady(model: Any) -> Iterator[None]:
    """Inside, rotary tables are those of short texts whatever the length, as a cache of rotated keys wants them.

    Beyond ``steady_until`` longrope takes other tables and dynamic NTK stretches its own: transformers then drops the
    cache or mixes keys that were rotated by different tables, so a graph with a cache ends there.
    """
    changing = list(_changing(model))
    kinds = {module: module.rope_type for module, *_ in changing}
    for module, prefix, layer, _ in changing:
        getattr(module, f"{prefix}inv_freq").copy_(getattr(module, f"{prefix}original_inv_freq"))
        module.rope_type = "default" if layer is None else {**module.rope_type, layer: "default"}
    try:
        yield
    finally:
        for module, kind in kinds.items():
            module.rope_type = kind


def _changing(model: Any) -> Iterator[tuple[Any, str, str | None, int]]:
    """Rotary embeddings whose tables change with length: module, prefix of its buffers, kind of layer, up to where."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            prefix = "" if layer is None else f"{layer}_"
            if kind == "longrope":
                parameters = module.config.rope_parameters
                own = parameters if layer is None else parameters[layer]
                yield module, prefix, layer, own["original_max_position_embeddings"]
            elif kind is not None and "dynamic" in kind:
                yield module, prefix, layer, module.original_max_seq_len
