"""Choose forms within a budget, measure what was chosen, and choose again where that is not what was predicted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .budget import Option, choose, totals

MISSED = 0.05
"""By what fraction a budget may be missed before it is chosen again."""
TRIES = 3


@dataclass(frozen=True)
class Goal:
    """What a choice has to meet; one of the three is given.

    Attributes:
        speedup: over the dense model.
        size: bytes, as a fraction of the dense model's.
        damage: that the options may add up to; then the least time is looked for.
    """

    speedup: float | None = None
    size: float | None = None
    damage: float | None = None

    def judge(self, measured: "Measured") -> tuple[bool, bool]:
        """Whether what was measured is enough, and whether it is what was asked for, within 5 %."""
        if self.speedup:
            return measured.speedup >= self.speedup * (1 - MISSED), abs(measured.speedup / self.speedup - 1) <= MISSED
        if self.size:
            return measured.size <= self.size * (1 + MISSED), abs(measured.size / self.size - 1) <= MISSED
        return True, True


@dataclass(frozen=True)
class Measured:
    """What a file of a choice came to.

    Attributes:
        nbytes: of the file.
        size: the same over the dense file's.
        dense_ms: of the dense file, measured in turns with the other; 0 where nothing was timed.
        ms: of the file.
        speedup: of the file, over the dense one.
    """

    nbytes: int
    size: float
    dense_ms: float = 0.0
    ms: float = 0.0
    speedup: float = 1.0


@dataclass(frozen=True)
class Try:
    """One choice, what was predicted of it, and what was measured on a file of it.

    Attributes:
        picks: the option of every group.
        damage: predicted.
        ms: predicted, of the whole model; 0 where nothing is timed.
        size: predicted bytes of the file, over the dense file's.
        measured: of the file.
    """

    picks: tuple[int, ...]
    damage: float
    ms: float
    size: float
    measured: Measured


@dataclass(frozen=True)
class Scale:
    """What files have told so far.

    Attributes:
        worth: seconds that a file gained over those that were predicted.
        rest: bytes of a file besides the weights of the groups.
        dense_ms: of the dense file.
    """

    worth: float
    rest: int
    dense_ms: float


class OutOfReachError(ValueError):
    """Nothing meets the budget.

    Attributes:
        nearest: the speed-up or the fraction of bytes that was measured where all was chosen that helps.
    """

    def __init__(self, nearest: float) -> None:
        """With the ``nearest`` that can be."""
        super().__init__(f"{nearest:.2f}")
        self.nearest = nearest


def predicted(groups: Sequence[Sequence[Option]], picks: Sequence[int], scale: Scale) -> tuple[float, int]:
    """Milliseconds and bytes of the whole model; the first option of every group is the dense one."""
    dense, chosen = totals(groups, [0] * len(groups)), totals(groups, picks)
    saved = 1e3 * scale.worth * (dense.seconds - chosen.seconds)
    return max(scale.dense_ms - saved, 1e-3), chosen.nbytes + scale.rest


def search(
    groups: Sequence[Sequence[Option]],
    goal: Goal,
    dense: Measured,
    measure: Callable[[Sequence[int]], Measured],
    tell: Callable[[str], None] = lambda text: None,
) -> list[Try]:
    """Every choice that was made; the last one counts.

    Where it misses the goal by more than 5 %, what linears gain is corrected by what was measured, and it is chosen
    again, twice at most.

    Args:
        groups: the options of every group, the first of each the dense one.
        goal: what to meet.
        dense: the dense model's file.
        measure: writes a choice to a file, and measures it.
        tell: told what is done.

    Raises:
        OutOfReachError: nothing meets the goal.
    """
    first = [0] * len(groups)
    scale = Scale(1.0, dense.nbytes - totals(groups, first).nbytes, dense.ms)
    tries: list[Try] = []
    while True:
        tell(f"choosing, try {len(tries) + 1}")
        picks, possible = pick(groups, goal, scale, dense.nbytes)
        ms, nbytes = predicted(groups, picks, scale)
        measured = measure(picks)
        sums = totals(groups, picks)
        tries.append(Try(picks, sums.damage, ms if dense.ms else 0.0, nbytes / dense.nbytes, measured))
        met, near = goal.judge(measured)
        if not possible and not met:
            raise OutOfReachError(measured.speedup if goal.speedup else measured.size)
        if near or not possible or len(tries) == TRIES:
            return tries
        gained, saved = measured.dense_ms - measured.ms, 1e3 * (totals(groups, first).seconds - sums.seconds)
        if goal.speedup and (gained <= 0 or saved <= 0):
            raise OutOfReachError(measured.speedup)
        worth = gained / saved if goal.speedup else scale.worth
        scale = Scale(worth, measured.nbytes - sums.nbytes, measured.dense_ms or scale.dense_ms)


def pick(
    groups: Sequence[Sequence[Option]], goal: Goal, scale: Scale, dense_bytes: int
) -> tuple[tuple[int, ...], bool]:
    """The options, and whether that is expected to be enough; where nothing is, those that gain most."""
    if goal.speedup:
        gain = scale.dense_ms / 1e3 * (1 - 1 / goal.speedup) / scale.worth
        found = choose(groups, seconds=sum(group[0].seconds for group in groups) - gain)
    elif goal.size:
        found = choose(groups, nbytes=goal.size * dense_bytes - scale.rest)
    else:
        assert goal.damage is not None
        found = choose(groups, damage=goal.damage, least="seconds")
    if found is not None:
        return tuple(found), True
    most = choose(groups, least="seconds" if goal.speedup else "nbytes")
    assert most is not None
    return tuple(most), False


def tightened(goal: Goal, predicted: float, measured: float) -> Goal:
    """A goal of damage, where a choice of ``predicted`` damage did ``measured``."""
    assert goal.damage is not None
    return replace(goal, damage=goal.damage * min(predicted / measured, 0.9) if measured > 0 else goal.damage)
