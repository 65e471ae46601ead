"""How the input features of a linear go together: the second moment of what it reads."""

import torch
from torch import Tensor

from .matmul import product

_TOKENS = 1024  # summed in one product; a longer sum might be split differently on more threads
_PANEL = 512  # rows of the matrix computed at once; what lies left of the panel is known by symmetry


class Hessian:
    r"""Accumulates the second moment of a linear's input over all tokens seen.

    .. math:: H = \frac{2}{n} \sum_t x_t x_t^\top

    The Hessian of the layer's mean squared error, Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be
    Accurately Pruned in One-Shot", section 3. Products are float32, 1,024 tokens at a time. The norms that scores
    use are on its diagonal.

    Args:
        in_features: number of input features, C.
    """

    def __init__(self, in_features: int) -> None:
        self._sum = torch.zeros(in_features, in_features)
        self._tokens = 0

    @property
    def in_features(self) -> int:
        """The number of input features, C."""
        return len(self._sum)

    @property
    def tokens(self) -> int:
        """The number of tokens counted so far, without those that a mask left out."""
        return self._tokens

    def add(self, other: "Hessian") -> None:
        """Count all that another one counted."""
        self._sum += other._sum
        self._tokens += other._tokens

    def update(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """Count the tokens of one batch.

        Args:
            x: ``[..., C]``, any float dtype.
            token_mask: ``[...]`` as ``x`` without its last axis; zero or False leaves a token out. None counts all.

        Raises:
            ValueError: a shape is wrong, or a counted token holds NaN, an infinity or numbers whose squares are
                none in float32. Nothing may be read from the statistic after that.
        """
        in_features = len(self._sum)
        if x.dim() == 0 or x.shape[-1] != in_features:
            raise ValueError(f"x wants {in_features} features on its last axis, got shape {tuple(x.shape)}")
        if token_mask is not None and token_mask.shape != x.shape[:-1]:
            raise ValueError(f"token_mask wants shape {tuple(x.shape[:-1])}, got {tuple(token_mask.shape)}")
        rows = x.detach().reshape(-1, in_features).float()
        if token_mask is not None:
            rows = rows[token_mask.reshape(-1).bool()]
        for chunk in torch.split(rows, _TOKENS):
            for start in range(0, in_features, _PANEL):
                panel = chunk[:, start : start + _PANEL]
                self._sum[start : start + _PANEL, start:] += product(panel.mT, chunk[:, start:])
        bad = int((~self._sum.diagonal().isfinite()).sum())
        if bad:
            raise ValueError(f"activations hold NaN or infinity in {bad} of {in_features} input features")
        self._tokens += len(rows)

    def matrix(self) -> Tensor:
        """``H`` so far, float32 ``[C, C]``, exactly symmetric.

        Raises:
            ValueError: no token was counted.
        """
        self._check()
        upper = self._sum.triu() * (2 / self._tokens)
        return upper + upper.triu(1).mT

    def norm(self) -> Tensor:
        """The L2 norm of every feature over all tokens, float32 ``[C]``; as `statistics.ActNorm`.

        Raises:
            ValueError: no token was counted.
        """
        self._check()
        return self._sum.diagonal().sqrt()

    def _check(self) -> None:
        if not self._tokens:
            raise ValueError("no calibration token reached this layer, so its activation norms are unknown")
