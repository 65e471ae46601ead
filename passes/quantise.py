"""Put the pruned weights of a block on the grid that they are stored on."""

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from ..calibrate import grid, quantise
from ..calibrate.damping import damped_inverse, sweep_factor
from ..calibrate.patterns import Pattern
from ..calibrate.rescale import rescale
from ..calibrate.update import DAMPING, relative_error
from .block import Block, Observed, alike
from .dialect.packed import OnGrid, packed_bytes
from .dialect.storage import Storage
from .errors import InputError
from .fitting import Fitting

STRENGTH_RATE: Final = 0.002
"""Peak learning rate of clipping strengths under AdamW."""
LEAST_STRENGTH: Final = 0.01
"""Clipping strengths that are learned stay at this or above."""
TURNS: Final = 3
"""How often, after a sweep, scales are fitted to the codes, and then codes to the scales."""


@dataclass(frozen=True)
class Gridded:
    """A weight, and the grid that its strengths give it.

    Attributes:
        path: of the linear, for messages.
        storage: what it is to be stored as, int8 or int4.
        exact: the weight, ``[R, C]`` float32; 0 where pruned.
        top: the largest magnitude of every group, ``[R, G]``, which its strength is a fraction of.
        strengths: clipping strengths, ``[R, G]``.
    """

    path: str
    storage: Storage
    exact: Tensor
    top: Tensor
    strengths: Tensor

    def scales(self) -> Tensor:
        """``[R, G]`` float32, differentiable in the strengths.

        Raises:
            InputError: one does not fit the storage.
        """
        try:
            return grid.scales(self.top, self.strengths, self.storage.grid)
        except ValueError as error:
            raise InputError(f"{self.path}: {error}; store the weights as fp32 or bf16") from error

    def rescaled(self, value: Tensor, hessian: Tensor) -> "Gridded":
        """With the scales that suit the codes of ``value`` best: see `rescale`."""
        scale = rescale(self.exact, hessian, value, self.scales(), self.storage.grid)
        return replace(self, strengths=torch.where(self.top > 0, scale * self.storage.grid.limit / self.top, 1.0))

    def near(self, value: Tensor) -> Tensor:
        """The weight, moved as far as it must to be rounded to ``value``, which is on the grid."""
        room = 0.45 * grid.spread(self.scales(), value.shape[1], self.storage.grid)
        return value + (self.exact - value).clamp(-room, room)

    def value(self) -> Tensor:
        """The nearest weight on the grid, differentiable in ``exact`` and ``strengths``."""
        its = self.storage.grid
        return grid.quantise(self.exact, grid.spread(self.scales(), self.exact.shape[1], its), its)


def quantise_block(
    block: Block,
    params: MutableMapping[str, Tensor],
    keep: Mapping[str, Tensor],
    patterns: Mapping[str, Pattern],
    observed: Observed,
    learned: Mapping[str, Gridded],
) -> dict[str, Gridded]:
    """Quantise the pruned weights of a block; nothing is done where its recipe does not ask for it.

    Left alone: weights that another block reads as well, and those whose packed form would not be smaller than the
    dense one. The first are rounded when they are packed, the others stay floats.

    Args:
        block: the block.
        params: weights by key, pruned; replaced by weights on the grid.
        keep: their masks.
        patterns: what they are stored by; weights without one stay floats.
        observed: the Hessians of their inputs.
        learned: grids of the dense weights, by key, whose strengths were learned with the masks. Without an update such
            weights are rounded to nearest, as they were while that was learned; with one these strengths are where the
            sweep begins.

    Returns:
        What was quantised, by key: the weights as they were before, and their grids.

    Raises:
        InputError: a weight does not fit the storage, or a Hessian is not positive definite with any damping.
    """
    wanted = block.recipe.quantise
    if wanted is None:
        return {}
    as_learned = bool(learned) and block.recipe.update == "none"
    nearest = wanted.method == "rtn" or as_learned
    done: dict[str, Gridded] = {}
    for nodes, keys in alike(block, keep).items():
        storages = {key: wanted.storage if (form := block.form(key)) is None else form.storage for key in keys}
        weights = {key: params[key].float() for key in keys if storages[key].quantised}
        own = {key: x for key, x in weights.items() if _gains(x, patterns.get(key), storages[key])}
        if as_learned:
            done |= {key: replace(learned[key], exact=weight) for key, weight in own.items()}
            params.update({key: done[key].value().to(params[key].dtype) for key in own})
        elif own:
            hessian = None if nearest else observed.hessian(nodes)
            made = quantise_alike(block, own, storages, keep, hessian, learned)
            done |= {key: gridded for key, (gridded, _) in made.items()}
            params.update({key: new.to(params[key].dtype) for key, (_, new) in made.items()})
    return done


def quantise_alike(
    fitting: Fitting,
    weights: Mapping[str, Tensor],
    storages: Mapping[str, Storage],
    keep: Mapping[str, Tensor],
    hessian: Tensor | None,
    learned: Mapping[str, Gridded],
) -> dict[str, tuple[Gridded, Tensor]]:
    """Quantise the weights of linears that read the same input.

    Args:
        fitting: what is known of the linears.
        weights: by key, float32, pruned.
        storages: by key, what they are stored as.
        keep: their masks.
        hessian: of what they read; None rounds to nearest.
        learned: grids whose strengths are where the sweep begins.

    Returns:
        By key: the weight as it was before with its grid, and the weight on the grid, float32.

    Raises:
        InputError: see ``quantise_block``.
    """
    whole = None if hessian is None else _with_dead(hessian)
    factor = None if whole is None or not weights else _factor(whole, fitting.path(next(iter(weights))))
    done = {}
    for key, weight in weights.items():
        importance = whole.diagonal() if whole is not None else None
        gridded = _gridded(fitting.path(key), storages[key], weight, importance, learned.get(key))
        if whole is None or factor is None:
            done[key] = gridded, gridded.value()
        else:
            done[key] = _fit(gridded, whole, factor, keep[key])
    return done


def first_grids(block: Block, keys: Iterable[str], params: Mapping[str, Tensor]) -> dict[str, Gridded]:
    """Grids of dense weights whose strengths are to be learned with the rates; none unless the recipe says joint.

    They begin at the strengths with the least error of the weights.

    Raises:
        InputError: a weight does not fit the storage.
    """
    wanted = block.recipe.quantise
    if wanted is None or wanted.method != "joint":
        return {}
    paths = {linear.weight: linear.path for linear in block.pruned}
    found = {}
    for key in keys:
        weight = params[key].float()
        found[key] = _gridded(paths[key], wanted.storage, weight, torch.ones(weight.shape[1]), None)
    return found


def for_packing(gridded: Gridded, pattern: Pattern | None) -> OnGrid:
    """What packing has to know of a weight that is on its grid and was pruned to ``pattern``, or to none."""
    scales = gridded.scales().to(gridded.storage.grid.dtype)
    return OnGrid(pattern, scales if gridded.storage.group else scales[:, 0].contiguous())


def quantised_errors(
    block: Block,
    params: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    quantised: Iterable[str],
    observed: Observed,
) -> dict[str, float]:
    """Relative error of the outputs of quantised linears, by key of the weight; empty where no Hessian is known.

    Args:
        block: the block.
        params: weights by key, as quantised.
        dense: the same before pruning.
        quantised: the keys in question.
        observed: the Hessians of their inputs.
    """
    errors: dict[str, float] = {}
    for nodes, keys in alike(block, quantised).items():
        hessian = observed.hessian(nodes)
        if hessian is not None:
            errors |= {key: relative_error(params[key].float(), dense[key].float(), hessian) for key in keys}
    return errors


def _gridded(
    path: str, storage: Storage, weight: Tensor, importance: Tensor | None, learned: Gridded | None
) -> Gridded:
    """A grid with the strengths learned, else those that are best by importance, else 1."""
    try:
        top = grid.largest(weight, storage.grid)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    made = Gridded(path, storage, weight, top, torch.ones_like(top))
    made.scales()  # refuses what does not fit
    if learned is not None:
        return replace(made, strengths=learned.strengths)
    if importance is not None:
        return replace(made, strengths=grid.search_strengths(weight, importance, storage.grid))
    return made


def _fit(start: Gridded, hessian: Tensor, factor: Tensor, keep: Tensor) -> tuple[Gridded, Tensor]:
    """The grid and the weight on it with which the layer's output changes least, as far as turns of both find them."""
    found, its = start, start.storage.grid
    value = quantise.sweep(found.exact, factor, keep, found.scales(), its)
    value = quantise.descend(found.exact, hessian, keep, found.scales(), its, value)
    for _ in range(TURNS):
        before, found = found.scales(), found.rescaled(value, hessian)
        ratio = found.scales() / torch.where(before > 0, before, 1.0)
        value = replace(found, exact=value * grid.spread(ratio, value.shape[1], its)).value()  # the same codes
        value = quantise.descend(found.exact, hessian, keep, found.scales(), its, value)
    return found, value


def _with_dead(hessian: Tensor) -> Tensor:
    """A Hessian in which features that calibration never saw count a little, so that no weight is forgotten."""
    diagonal = hessian.diagonal()
    little = DAMPING["sparsegpt"] * float(diagonal.double().mean()) or 1.0
    return hessian + torch.diag((diagonal == 0).float() * little)


def _factor(hessian: Tensor, path: str) -> Tensor:
    try:
        return sweep_factor(damped_inverse(hessian, DAMPING["sparsegpt"]).matrix)
    except ValueError as error:
        raise InputError(f"{path}: {error}; take --quantise rtn, or more calibration text") from error


def _gains(weight: Tensor, pattern: Pattern | None, storage: Storage) -> bool:
    """Whether the weight will be packed: it is not all zero, and the packed form is smaller than the dense one."""
    if not bool(weight.any()):
        return False
    if pattern is None:
        return storage.blocked
    rows, columns = weight.shape
    size = packed_bytes(rows, columns, int(weight.count_nonzero()), pattern, storage)
    return size < weight.numel() * weight.element_size()
