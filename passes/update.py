"""Prune the linears of a block and let the surviving weights make up for the rest."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibrate.patterns import Pattern, RowCounts
from ..calibrate.update import prepare, relative_error, update
from .block import GROUPS, Block, Observed, alike
from .errors import InputError
from .recipe import Recipe


@dataclass(frozen=True)
class Updated:
    """One weight as pruned.

    Attributes:
        weight: +0.0 where pruned.
        keep: its mask.
        error_before: relative error of the linear's output with the original weights under the mask given; None
            without an update.
        error_after: the same as pruned.
    """

    weight: Tensor
    keep: Tensor
    error_before: float | None = None
    error_after: float | None = None


def update_block(
    block: Block,
    params: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    observed: Observed,
) -> dict[str, Updated]:
    """The weights of a block as pruned, by key.

    Left alone but for the mask: weights that another block reads as well, which would be fitted to this block's inputs.
    What two linears of the block share is fitted to the inputs of both.

    Raises:
        InputError: a Hessian is not positive definite with any damping.
    """
    done = {}
    groups = {} if block.recipe.update == "none" else alike(block, keep)
    fitted = {key for keys in groups.values() for key in keys}
    for key in (key for key in keep if key not in fitted):
        done[key] = Updated(torch.where(keep[key], params[key], 0.0), keep[key])  # literal +0.0, never -0.0
    for nodes, keys in groups.items():
        hessian = observed.hessian(nodes)
        assert hessian is not None
        own = {key: _target(block.recipe, keep[key]) for key in keys}
        done |= _update_alike(block, {key: params[key] for key in keys}, keep, own, hessian)
    return done


def _target(recipe: Recipe, keep: Tensor) -> Pattern | RowCounts | Tensor:
    """What an update is to make: the mask itself, or, where it chooses, the pattern or the counts that were learned."""
    if recipe.mask_from == "score":
        return keep
    return recipe.pattern if recipe.allocation is None else RowCounts((~keep).sum(dim=1))


def _update_alike(
    block: Block,
    weights: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    targets: Mapping[str, Pattern | RowCounts | Tensor],
    hessian: Tensor,
) -> dict[str, Updated]:
    """Update the weights of linears that read the same input."""
    recipe = block.recipe
    assert recipe.update != "none"
    path = next(linear.path for linear in block.pruned if linear.weight in weights)
    try:
        inputs = prepare(hessian, recipe.update, recipe.damping)
    except ValueError as error:
        raise InputError(f"{path}: {error}; give a larger --damping, or more calibration text") from error
    if inputs.raised:
        block.note(f"{path}: its Hessian is not positive definite as it is; --damping raised to {inputs.raised:g}")
    done = {}
    for key, weight in weights.items():
        weight = weight.float()
        new, own = update(weight, inputs, targets[key], per=GROUPS[recipe.score])
        if not bool(new.isfinite().all()):
            raise InputError(f"{path}: the update has no finite solution; give a larger --damping")
        before = relative_error(torch.where(keep[key], weight, 0.0), weight, hessian)
        done[key] = Updated(new.to(weights[key].dtype), own, before, relative_error(new, weight, hessian))
    return done
