"""How many numbers a recipe learns or solves for."""

import math
from collections.abc import Iterable

from sparsify_export.passes.recipe import LinearReport, Recipe


def learned(recipe: Recipe, linears: Iterable[LinearReport]) -> int:
    """Surviving weights that are changed, logits of BESA's distributions, and clipping strengths, of all linears.

    A weight that is solved for and then trained counts once.

    Args:
        recipe: what was made.
        linears: what became of them; those that stayed dense count nothing.
    """
    total = 0
    for linear in linears:
        if linear.pattern is None:
            continue
        rows, columns = linear.shape
        if recipe.update != "none" or recipe.tune or recipe.distil:
            total += round(rows * columns * (1 - linear.sparsity))
        if learning := recipe.allocation:
            candidates = len(learning.patterns) if learning.per == "pattern" else learning.rate_steps + 1
            total += candidates * (rows if learning.per == "row" else 1)
        if recipe.quantise and recipe.quantise.method == "joint":
            total += rows * math.ceil(columns / (recipe.quantise.storage.group or columns))
    return total
