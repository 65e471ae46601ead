"""Choose one form for every group of linears: the least damage or time, within limits of the other figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

GAP = 1e-4
"""How far from the least a choice may be, as a fraction: what is known of the figures is far less exact."""
Figure = Literal["damage", "seconds", "nbytes"]


@dataclass(frozen=True)
class Option:
    """One form that a group of linears can have.

    Attributes:
        seconds: of the group in the workload.
        nbytes: of its weights as stored.
        damage: what the form adds to the model's loss; 0 for the form that the group has.
    """

    seconds: float
    nbytes: int
    damage: float


def choose(
    groups: Sequence[Sequence[Option]],
    *,
    seconds: float = math.inf,
    nbytes: float = math.inf,
    damage: float = math.inf,
    least: Figure = "damage",
) -> list[int] | None:
    r"""The option of every group that add up to the least of one figure, by integer programming (HiGHS).

    .. math:: \min_z \sum_{gf} d_{gf} z_{gf} \quad \sum_f z_{gf} = 1, \ \sum_{gf} t_{gf} z_{gf} \le T, \
              \sum_{gf} b_{gf} z_{gf} \le B, \ \sum_{gf} d_{gf} z_{gf} \le D, \ z \in \{0, 1\}

    Damage is taken as additive: what two groups add to the loss together is what each adds alone.

    Args:
        groups: the options of every group.
        seconds: T, for all groups together.
        nbytes: B.
        damage: D.
        least: what is to be small: d, t or b.

    Returns:
        The place of an option in each group; None where nothing is within all limits.

    Raises:
        ValueError: a figure is negative or not finite, or a group has no option.
    """
    options = [option for group in groups for option in group]
    figures = {
        "seconds": np.array([option.seconds for option in options], np.float64),
        "nbytes": np.array([option.nbytes for option in options], np.float64),
        "damage": np.array([option.damage for option in options], np.float64),
    }
    if not all(groups) or not all((np.isfinite(x) & (x >= 0)).all() for x in figures.values()):
        raise ValueError("every group wants an option, and every option figures of 0 or more")
    if not groups:
        return []
    ends = np.cumsum([len(group) for group in groups])
    one_each = np.zeros((len(groups), len(options)))
    for row, (end, group) in enumerate(zip(ends, groups, strict=True)):
        one_each[row, end - len(group) : end] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, limit in (("seconds", seconds), ("nbytes", nbytes), ("damage", damage)):
        if math.isfinite(limit):
            # Scaled, since the solver's tolerance is absolute: seconds are small, bytes are many.
            scale = figures[name].max() or 1.0
            constraints.append(LinearConstraint(figures[name] / scale, -np.inf, limit / scale))
    wanted = figures[least]
    found = milp(
        wanted / (wanted.max() or 1.0),
        constraints=constraints,
        integrality=np.ones(len(options), np.int64),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        return None
    return [int(np.argmax(found.x[end - len(group) : end])) for end, group in zip(ends, groups, strict=True)]


def totals(groups: Sequence[Sequence[Option]], picks: Sequence[int]) -> Option:
    """What the options picked add up to."""
    picked = [group[pick] for group, pick in zip(groups, picks, strict=True)]
    return Option(
        sum(option.seconds for option in picked),
        sum(option.nbytes for option in picked),
        sum(option.damage for option in picked),
    )


def frontier(groups: Sequence[Sequence[Option]], points: int) -> list[list[int]]:
    """Choices from the least damage to the least time, each with the least damage within its time; none twice.

    Args:
        groups: the options of every group.
        points: how many times between both, evenly spread.
    """
    slow, fast = choose(groups), choose(groups, least="seconds")
    assert slow is not None
    assert fast is not None
    begin, end = totals(groups, slow).seconds, totals(groups, fast).seconds
    limits = [begin + (end - begin) * step / (points - 1) for step in range(points)]
    found = [choose(groups, seconds=limit * (1 + 1e-9)) for limit in limits]
    return [list(picks) for picks in dict.fromkeys(tuple(picks) for picks in found if picks is not None)]
