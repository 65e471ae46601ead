"""The channel order in which an N:M mask keeps the most score."""

from dataclasses import dataclass

import torch

from .assign import refine_place
from .masks import nm_keep_mask, retained
from .patterns import NM
from .reallocate import reallocate
from .sums import total


@dataclass(frozen=True)
class ChannelOrder:
    """An order of input channels, and what it is worth.

    Attributes:
        order: int64 ``[C]``: new channel j is old channel ``order[j]``, so the weight becomes ``weight[:, order]``.
        retained_before: retained score of the N:M mask in the original order, 0 to 1.
        retained_after: the same in the new order; never less.
        rounds: refinement rounds that were run.
    """

    order: torch.Tensor
    retained_before: float
    retained_after: float
    rounds: int

    @property
    def is_identity(self) -> bool:
        """Whether every channel stays where it is."""
        return bool((self.order == torch.arange(len(self.order))).all())


def retained_nm(score: torch.Tensor, nm: NM) -> float:
    """The score that the best N:M mask keeps, over all the score; 1.0 when there is no score to lose.

    Raises:
        ValueError: in_features is not a multiple of ``m``, or the score holds NaN.
    """
    return retained(score, nm_keep_mask(score, nm))


def find_order(score: torch.Tensor, nm: NM, *, tolerance: float = 1e-4, max_rounds: int = 20) -> ChannelOrder:
    """Search the channel order whose N:M mask retains the most score.

    Channel permutation of Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models": heuristic reallocation, then linear-sum-assignment of one place after another (`refine_place`).
    The paper goes over the places once; here the rounds repeat until one gains too little. No step can lose, and the
    original order is returned if the search found none better. What several consumers share is found by stacking their
    scores as rows.

    The retained score hangs only on which channels share a group. So channels ascend within a group and groups ascend
    by their first channel, which leaves the order as close to the original as its groups allow.

    Args:
        score: ``[R, C]``, finite and nowhere negative; larger means keep.
        nm: the pattern; C must be a multiple of ``nm.m``.
        tolerance: stop after a round that raised the retained score by less than this fraction of itself.
        max_rounds: most rounds of refinement; 0 leaves it at the reallocation.

    Returns:
        The order, on the CPU. The same on every run and for any number of threads.

    Raises:
        ValueError: the score is not such a matrix, ``tolerance`` or ``max_rounds`` is negative.
    """
    if not (tolerance >= 0 and max_rounds >= 0):
        raise ValueError(f"tolerance and max_rounds want 0 or more, got {tolerance} and {max_rounds}")
    score = score.detach().to("cpu", torch.float32)
    if score.numel() and not (float(score.min()) >= 0 and float(score.max()) < float("inf")):
        raise ValueError("score wants finite numbers, none negative and none NaN")
    before = retained_nm(score, nm)
    channels = score.shape[1]
    identity = ChannelOrder(torch.arange(channels), before, before, rounds=0)
    everything = total(score)
    if everything == 0 or channels == nm.m:
        return identity
    channel_at = reallocate(score, nm)
    planes = score[:, channel_at].movedim(1, 0).contiguous()
    kept, round_gain, rounds = before * everything, float("inf"), 0
    while rounds < max_rounds and round_gain > tolerance * kept:
        round_gain = 0.0
        for place in range(nm.m):
            source, growth = refine_place(planes, place, nm)
            channel_at[place] = channel_at[place, source]
            planes[place] = planes[place][:, source]
            round_gain += growth
        kept += round_gain
        rounds += 1
    groups = channel_at.T.sort(dim=1).values
    order = groups[groups[:, 0].argsort()].reshape(-1)
    after = retained_nm(score[:, order], nm)
    if after <= before:
        return ChannelOrder(identity.order, before, before, rounds)
    return ChannelOrder(order, before, after, rounds)
