"""What the calibration tokens looked like to a linear: the L2 norm of every input feature."""

import torch

_CHUNK = 1 << 18  # elements whose squares exist at one time: 1 MB, stays in the cache


class ActNorm:
    r"""Accumulates the L2 norm of each input feature over all tokens seen.

    .. math:: \lVert X_j \rVert_2 = \sqrt{\textstyle\sum_t x_{tj}^2}

    Not squared and not a mean: Wanda (Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language
    Models", section 3) and RIA (Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for
    Large Language Models") are defined on this. Squares are added in float32 within a chunk, in float64 across chunks.

    Args:
        in_features: number of input features, K.
        device: where the sums live; inputs are reduced where they are and then moved.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._tokens = 0

    @property
    def in_features(self) -> int:
        """The number of input features, K."""
        return len(self._squares)

    @property
    def squares(self) -> torch.Tensor:
        """The sum of the squares of every feature so far, float64 ``[K]``."""
        return self._squares

    @property
    def tokens(self) -> int:
        """The number of tokens counted so far, without those that a mask left out."""
        return self._tokens

    def update(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> None:
        """Count the tokens of one batch.

        Args:
            x: ``[..., K]``, any float dtype.
            token_mask: ``[...]`` as ``x`` without its last axis; zero or False leaves a token out, whatever it
                holds, so an attention mask does. None counts all tokens.

        Raises:
            ValueError: a shape is wrong, or a counted token holds NaN or an infinity. Nothing is counted then.
        """
        in_features = len(self._squares)
        if x.dim() == 0 or x.shape[-1] != in_features:
            raise ValueError(f"x wants {in_features} features on its last axis, got shape {tuple(x.shape)}")
        if token_mask is not None and token_mask.shape != x.shape[:-1]:
            raise ValueError(f"token_mask wants shape {tuple(x.shape[:-1])}, got {tuple(token_mask.shape)}")
        rows = x.detach().reshape(-1, in_features)
        size = max(1, _CHUNK // max(1, in_features))
        batch = torch.zeros(in_features, dtype=torch.float64, device=x.device)
        tokens = 0
        counted = None if token_mask is None else torch.split(token_mask.reshape(-1).bool(), size)
        for index, chunk in enumerate(torch.split(rows, size)):
            if counted is not None:
                chunk = chunk[counted[index]]
            batch += _sum_of_squares(chunk)
            tokens += len(chunk)
        if not bool(batch.isfinite().all()):
            bad = int((~batch.isfinite()).sum())
            raise ValueError(f"activations hold NaN or infinity in {bad} of {in_features} input features")
        self._squares += batch.to(self._squares.device)
        self._tokens += tokens

    def add(self, other: "ActNorm") -> None:
        """Count all that another one counted."""
        self._squares += other.squares
        self._tokens += other._tokens

    def norm(self) -> torch.Tensor:
        """The norms so far, float32 ``[K]``.

        Raises:
            ValueError: no token was counted.
        """
        if not self._tokens:
            raise ValueError("no calibration token reached this layer, so its activation norms are unknown")
        return self._squares.sqrt().float()


def _sum_of_squares(chunk: torch.Tensor) -> torch.Tensor:
    """Sum the squares of ``[tokens, K]`` over its tokens; ``[K]``, float64 where float32 overflows."""
    squares = chunk.float().square().sum(dim=0)
    return squares if bool(squares.isfinite().all()) else chunk.double().square().sum(dim=0)
