"""Perplexity over non-overlapping windows: the same code for a torch model and for an exported file."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..passes.errors import InputError
from .session import CausalSession

Logits: TypeAlias = Callable[[Tensor], Tensor]
"""Maps token ids int64 ``[batch, length]`` to logits ``[batch, length, vocabulary]``."""

ROWS = 128  # tokens whose exponentials are held at once; a window's worth would double the memory of its logits


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        perplexity: ``exp(mean_nll)``.
        mean_nll: mean negative log likelihood of the predicted tokens, in nats.
        tokens: how many tokens were predicted; the first of every window is given, not predicted.
        windows: how many windows were read.
        window: tokens in a window.
    """

    perplexity: float
    mean_nll: float
    tokens: int
    windows: int
    window: int


def perplexity(
    logits: Logits, windows: Tensor, *, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> Perplexity:
    r"""Evaluate a causal language model.

    .. math:: \exp\Big(-\frac{1}{W(L-1)} \sum_{w=1}^{W} \sum_{t=2}^{L} \log p(x_{w,t} \mid x_{w,1..t-1})\Big)

    Windows do not see each other, so the figure depends on their length: state it with the perplexity.

    Args:
        logits: the model; ``torch_logits`` and ``onnx_logits`` make one.
        windows: int64 ``[W, L]``.
        progress: told what is done, how many windows are, and how many there are.

    Raises:
        InputError: there is no window, windows are shorter than 2 tokens, or the logits of a window hold a NaN.
    """
    count, length = windows.shape
    if count == 0 or length < 2:
        raise InputError(f"perplexity wants at least one window of 2 or more tokens, got {count} of {length}")
    total = 0.0
    for index, ids in enumerate(windows):
        with torch.inference_mode():
            nll = _nll(logits(ids[None])[0, :-1], ids[1:])
        if not math.isfinite(nll):
            raise InputError(f"the model's logits are not finite in window {index + 1} of {count}; it is damaged")
        total += nll
        progress("evaluating", index + 1, count)
    tokens = count * (length - 1)
    mean = total / tokens
    # exp overflows at 710 nats, which no finite logits of a trained model reach.
    return Perplexity(math.exp(mean) if mean < 709 else math.inf, mean, tokens, count, length)


def torch_logits(model: Any) -> Logits:
    """A transformers model as a function from ids to logits, without a cache."""
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def onnx_logits(session: CausalSession) -> Logits:
    """An exported file as a function from ids to logits, with an empty cache."""

    def logits(ids: Tensor) -> Tensor:
        out, _ = session.step(ids.numpy(), np.ones(ids.shape, np.int64), session.empty_past(len(ids)))
        return torch.from_numpy(out)

    return logits


def _nll(logits: Tensor, targets: Tensor) -> float:
    """Summed negative log likelihood in float32, the sum in float64."""
    total = 0.0
    for rows, wanted in zip(torch.split(logits, ROWS), torch.split(targets, ROWS), strict=True):
        rows = rows.float()
        chosen = rows.gather(1, wanted[:, None])[:, 0]
        total += (rows.logsumexp(1) - chosen).double().sum().item()
    return total
