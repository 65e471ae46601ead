"""Choose one form for every group of linears: the least damage within a budget of time and bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

GAP = 1e-4
"""How far from the least damage a choice may be, as a fraction: what is known of the damage is far less exact."""


@dataclass(frozen=True)
class Form:
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
    groups: Sequence[Sequence[Form]], *, seconds: float = math.inf, nbytes: float = math.inf
) -> list[int] | None:
    r"""The form of every group that adds up to the least damage, by integer programming (HiGHS).

    .. math:: \min_z \sum_{gf} d_{gf} z_{gf} \quad \sum_f z_{gf} = 1, \ \sum_{gf} t_{gf} z_{gf} \le T, \
              \sum_{gf} b_{gf} z_{gf} \le B, \ z \in \{0, 1\}

    Damage is taken as additive: what two groups add to the loss together is what each adds alone.

    Args:
        groups: the forms of every group.
        seconds: T, for all groups together.
        nbytes: B.

    Returns:
        The place of a form in each group; None where nothing is within both limits.

    Raises:
        ValueError: a figure is negative or not finite, or a group has no form.
    """
    forms = [form for group in groups for form in group]
    if not all(groups) or not all(
        math.isfinite(x) and x >= 0 for form in forms for x in (form.seconds, form.nbytes, form.damage)
    ):
        raise ValueError("every group wants a form, and every form figures of 0 or more")
    if not groups:
        return []
    ends = np.cumsum([len(group) for group in groups])
    one_each = np.zeros((len(groups), len(forms)))
    for row, (end, group) in enumerate(zip(ends, groups, strict=True)):
        one_each[row, end - len(group) : end] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    for limit, figures in ((seconds, [form.seconds for form in forms]), (nbytes, [form.nbytes for form in forms])):
        if math.isfinite(limit):
            # Scaled, since the solver's tolerance is absolute: seconds are small, bytes are many.
            scale = max(figures) or 1.0
            constraints.append(LinearConstraint(np.array(figures) / scale, -np.inf, limit / scale))
    damage = np.array([form.damage for form in forms])
    found = milp(
        damage / (damage.max() or 1.0),
        constraints=constraints,
        integrality=np.ones(len(forms), np.int64),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        return None
    return [int(np.argmax(found.x[end - len(group) : end])) for end, group in zip(ends, groups, strict=True)]
