"""What of a model's first output counts when the model is trained, and how far two of them are apart."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from ..calibrate.sums import total
from .frontend.batches import Batch

TEMPERATURE: Final = 0.05
"""Of the softmax over similarities: cosines differ by hundredths, and what is ranked first counts."""
SIMILARITY: Final = 0.3
"""Weight of the similarities of texts to each other, beside the embeddings themselves: their gradient is noisy."""
STATES: Final = 1.0
"""Weight of the hidden states, beside the embeddings that are made of them."""
TINY: Final = 1e-12


@dataclass(frozen=True)
class Pooled:
    """Hidden states ``[texts, tokens, size]`` that one vector a text is made of.

    Attributes:
        mode: mean or maximum over a text's tokens, the first of them, or the last.
        normalise: divide by the Euclidean norm.
    """

    mode: Literal["mean", "cls", "max", "lasttoken"] = "mean"
    normalise: bool = True

    def __str__(self) -> str:
        return f"embeddings, by {self.mode}{', normalised' if self.normalise else ''}"


Output: TypeAlias = Literal["logits", "classes", "labels", "values"] | Pooled
"""What the model returns first: logits of the next token, logits of classes of which one is right, logits of labels
each of which is right or not, values such as hidden states, or hidden states that texts' embeddings are made of."""


def rows_of(output: Output, first: Tensor, batch: Batch) -> Tensor:
    """What is compared, ``[rows, features]`` float32: a row a token that counts, or a row a sample.

    Of what embeddings are made of it is all states, ``[texts, tokens, size]``, 0 where there is padding.

    Args:
        output: what ``first`` is.
        first: the model's first output, ``[samples, tokens, features]`` or ``[samples, features]``.
        batch: what it was made from; says which tokens count.
    """
    first, mask = first.float(), batch.token_mask
    if isinstance(output, Pooled):
        return first if mask is None else first.masked_fill(~mask[..., None], 0.0)
    rows = first.flatten(end_dim=-2)
    return rows if mask is None or first.dim() == 2 else rows[mask.reshape(-1)]


def pool(states: Tensor, mask: Tensor | None, pooled: Pooled) -> Tensor:
    """One vector a text, ``[texts, size]``, as sentence-transformers makes it; differentiable.

    Args:
        states: ``[texts, tokens, size]``.
        mask: bool ``[texts, tokens]``, False for padding; None where every token counts.
        pooled: how.
    """
    counts = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask
    if pooled.mode == "mean":
        weights = counts[..., None].to(states.dtype)
        vectors = (states * weights).sum(1) / weights.sum(1)
    elif pooled.mode == "max":
        vectors = states.masked_fill(~counts[..., None], -torch.inf).amax(1)
    else:
        places = counts.int()
        first, last = places.argmax(1), counts.shape[1] - 1 - places.flip(1).argmax(1)
        vectors = states[torch.arange(len(states)), first if pooled.mode == "cls" else last]
    return normalize(vectors, dim=1, eps=TINY) if pooled.normalise else vectors


def target_of(output: Output, rows: Tensor) -> Tensor:
    """What the dense model says, as ``errors`` wants it: log-probabilities, or the rows as they are."""
    return rows.log_softmax(-1) if output in ("logits", "classes") else rows


def errors(output: Output, rows: Tensor, target: Tensor, batch: Batch) -> Tensor:
    r"""What adds up to the loss of a batch, ``[rows, some]``; `size_of` is what that is divided by.

    Logits z of tokens or classes, with a softmax (Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural
    Network", temperature 1), labels, with a sigmoid each, and values y:

    .. math:: \mathrm{KL}\bigl(\sigma(z) \,\Vert\, \sigma(z^W)\bigr) \qquad
              \textstyle\sum_l \mathrm{KL}\bigl(s(z_l) \,\Vert\, s(z_l^W)\bigr) \qquad
              \lVert y^W - y \rVert_2^2

    Embeddings e of the texts of a batch, with the softmax over the other texts' cosines divided by a temperature, and
    the states h that they are made of, for a text has one embedding and many states to learn from. Of unit vectors the
    first term is twice one minus their cosine:

    .. math:: \frac{\lVert e_i^W - e_i \rVert_2^2}{\lVert e_i \rVert_2^2}
              + \mathrm{KL}\bigl(\sigma(c_i / \tau) \,\Vert\, \sigma(c_i^W / \tau)\bigr)
              + \frac{\sum_t \lVert h_{it}^W - h_{it} \rVert_2^2}{\sum_t \lVert h_{it} \rVert_2^2},
              \quad c_{ij} = \cos(e_i, e_j), \ j \ne i

    (the second as Fang et al. 2021, "SEED: Self-supervised Distillation for Visual Representation", with the batch in
    place of a queue).
    """
    if isinstance(output, Pooled):
        return _embedding_errors(output, rows, target, batch.token_mask)
    if output in ("logits", "classes"):
        return _divergence(target, rows.log_softmax(-1))
    if output == "labels":
        return _divergence(logsigmoid(target), logsigmoid(rows)) + _divergence(logsigmoid(-target), logsigmoid(-rows))
    return (rows - target).square()


def size_of(output: Output, target: Tensor) -> float:
    """What the loss of a batch is divided by: rows, or the energy of values."""
    return total(target.square()) if output == "values" else float(len(target))


def _embedding_errors(pooled: Pooled, states: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """The three terms of every text, ``[texts, 3]``; two where there are too few texts to be like each other."""
    made, wanted = pool(states, mask, pooled), pool(target, mask, pooled)
    parts = [_relative(made, wanted), STATES * _relative(states.flatten(1), target.flatten(1))]
    if len(states) > 2:  # of two texts the only other one has all of the probability
        parts.append(SIMILARITY * _divergence(_likeness(wanted), _likeness(made)).sum(1))
    return torch.stack(parts, dim=1)


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of every row over its energy."""
    return (found - wanted).square().sum(1) / wanted.square().sum(1).clamp(min=TINY)


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """The terms of a divergence from log-probabilities; of what has none, nothing."""
    return wanted.exp() * (wanted - found)


def _likeness(vectors: Tensor) -> Tensor:
    """Of every text, the log-probabilities of the others, ``[texts, texts - 1]``."""
    count = len(vectors)
    unit = normalize(vectors, dim=1, eps=TINY)
    others = (unit @ unit.T)[~torch.eye(count, dtype=torch.bool)].reshape(count, count - 1)
    return (others / TEMPERATURE).log_softmax(-1)
