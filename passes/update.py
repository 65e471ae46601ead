"""Prune the linears of a block and let the surviving weights make up for the rest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ..calibrate.patterns import Pattern, RowCounts
from ..calibrate.update import DAMPING, Inputs, cost, prepare, relative_error, update
from .block import GROUPS, Block, Observed, alike
from .errors import InputError
from .fitting import Fitting
from .recipe import Recipe

MORE: Final = (0.01, 0.1, 1.0)
"""Damping that is tried where an update makes a layer worse."""


@dataclass(frozen=True)
class Updated:
    """One weight as pruned.

    Attributes:
        weight: +0.0 where pruned.
        keep: its mask.
        error_before: relative error of the linear's output with the original weights under the mask given; None
            without an update.
        error_after: the same as pruned.
        refused: why the update was not taken, or with more damping only; "" where it was taken as it is.
        directions: how many directions the inputs were seen in; None where that is not known.
    """

    weight: Tensor
    keep: Tensor
    error_before: float | None = None
    error_after: float | None = None
    refused: str = ""
    directions: int | None = None


def update_block(
    block: Block,
    params: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    observed: Observed,
) -> dict[str, Updated]:
    """The weights of a block as pruned, by key.

    Left alone but for the mask: weights that another block reads as well, which would be fitted to this block's inputs.
    What two linears of the block share is fitted to the inputs of both. Where nothing is pruned there is nothing to
    make up for.

    Raises:
        InputError: a Hessian is not positive definite with any damping.
    """
    done = {}
    pruned = [key for key in keep if block.pattern(key) is not None]
    groups = {} if block.recipe.update == "none" else alike(block, pruned)
    fitted = {key for keys in groups.values() for key in keys}
    for key in (key for key in keep if key not in fitted):
        done[key] = Updated(torch.where(keep[key], params[key], 0.0), keep[key])  # literal +0.0, never -0.0
    for nodes, keys in groups.items():
        hessian = observed.hessian(nodes)
        assert hessian is not None
        own = {key: target_of(block.recipe, keep[key], block.pattern(key)) for key in keys}
        done |= update_alike(block, {key: params[key] for key in keys}, keep, own, hessian)
    return done


def target_of(recipe: Recipe, keep: Tensor, pattern: Pattern | None) -> Pattern | RowCounts | Tensor:
    """What an update is to make: the mask itself, or, where it chooses, the pattern or the counts that were learned."""
    if recipe.mask_from == "score" or pattern is None:
        return keep
    return pattern if recipe.allocation is None else RowCounts((~keep).sum(dim=1))


def update_alike(
    fitting: Fitting,
    weights: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    targets: Mapping[str, Pattern | RowCounts | Tensor],
    hessian: Tensor,
) -> dict[str, Updated]:
    """Update the weights of linears that read the same input.

    An update that makes a layer worse (`calibrate.update.cost`) is tried again with more damping; where none helps, the
    original weights stay, under the score's mask.

    Args:
        fitting: the recipe, and what is known of the linears.
        weights: by key, ``[out_features, in_features]``.
        keep: their masks by the score.
        targets: what the update is to make of each; see ``target_of``.
        hessian: of what they read.

    Raises:
        InputError: the Hessian is not positive definite with any damping.
    """
    recipe = fitting.recipe
    assert recipe.update != "none"
    first = DAMPING[recipe.update] if recipe.damping is None else recipe.damping
    masked = {key: torch.where(keep[key], weight.float(), 0.0) for key, weight in weights.items()}
    before = {key: relative_error(masked[key], weight.float(), hessian) for key, weight in weights.items()}
    done: dict[str, Updated] = {}
    directions = None
    for damping in (first, *(more for more in MORE if more > first)):
        inputs = _prepare(fitting, fitting.path(next(iter(weights))), hessian, damping)
        directions = inputs.directions if directions is None else directions
        for key in [key for key in weights if key not in done]:
            weight = weights[key].float()
            new, own = _update_rows(fitting, key, weight, inputs, targets[key], cautious=damping != first)
            if not bool(new.isfinite().all()) or cost(new, weight, hessian) > cost(masked[key], weight, hessian):
                continue
            why = "" if damping == first else f"made its layer worse below a damping of {damping:g}"
            after = relative_error(new, weight, hessian)
            done[key] = Updated(new.to(weights[key].dtype), own, before[key], after, why, directions)
        if len(done) == len(weights):
            break
    for key in [key for key in weights if key not in done]:
        why = "would make its layer worse with any damping, so the weights that its mask keeps stay as they were"
        done[key] = Updated(masked[key].to(weights[key].dtype), keep[key], before[key], before[key], why, directions)
    for key, its in done.items():
        if its.refused:
            fitting.note(f"{fitting.path(key)}: its update {its.refused}")
    return {key: done[key] for key in weights}


def _update_rows(
    fitting: Fitting,
    key: str,
    weight: Tensor,
    inputs: Inputs,
    target: Pattern | RowCounts | Tensor,
    *,
    cautious: bool,
) -> tuple[Tensor, Tensor]:
    """`update` of each of the linears that a fused one is made of: their weights do not compete with each other."""
    parts = fitting.parts(key)
    rows = parts.split(weight)
    targets: list[Pattern | RowCounts | Tensor]
    if isinstance(target, RowCounts):
        targets = [RowCounts(pruned) for pruned in parts.split(target.pruned)]
    elif isinstance(target, Tensor):
        targets = [*parts.split(target)]
    else:
        targets = [target] * len(rows)
    done = [
        update(each, inputs, own, per=GROUPS[fitting.recipe.score], cautious=cautious)
        for each, own in zip(rows, targets, strict=True)
    ]
    return parts.joined([new for new, _ in done]), parts.joined([keep for _, keep in done])


def _prepare(fitting: Fitting, path: str, hessian: Tensor, damping: float) -> Inputs:
    assert fitting.recipe.update != "none"
    try:
        inputs = prepare(hessian, fitting.recipe.update, damping)
    except ValueError as error:
        raise InputError(f"{path}: {error}; give a larger --damping, or more calibration text") from error
    if inputs.raised:
        fitting.note(f"{path}: its Hessian is not positive definite as it is; --damping raised to {inputs.raised:g}")
    return inputs
