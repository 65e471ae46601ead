"""Prune weights of an ONNX model on what their linears read: score, mask, update and grid, as in traced models.

What a weight is fitted to is observed while the model runs (`runtime.prune_onnx`). Everything here is done to the
weights of one input at a time, by the same functions as in the block loop of traced models.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...calibrate import masks, scores
from ...calibrate.damping import damped_inverse
from ...calibrate.hessian import Hessian
from ...calibrate.statistics import ActNorm
from ...calibrate.update import relative_error
from ..block import GROUPS
from ..dialect.packed import OnGrid
from ..errors import InputError
from ..mapped import as_bytes
from ..parts import Parts
from ..quantise import for_packing, quantise_alike
from ..recipe import Note, Quantiser, Recipe
from ..update import target_of, update_alike
from .sections import Reading, Section, Shared, sweeps

ZERO, EMPTY = "the weight is zero everywhere", "nothing of the weight would be left"
"""Why a weight stays as it is."""


@dataclass(frozen=True)
class Fitted:
    """A weight as pruned, and what is reported of it; see ``recipe.LinearReport``.

    Attributes:
        read: reads it, ``[out_features, in_features]`` in the type that it had, +0.0 where pruned.
        origin: a digest of the weight that it was made from; see ``digest``.
        on_grid: what packing has to know of it, where it is on a grid; else None.
    """

    read: Callable[[], Tensor]
    origin: str
    retained_before: float
    retained_after: float
    error_before: float | None = None
    error_after: float | None = None
    refused: str = ""
    directions: int | None = None
    on_grid: OnGrid | None = None
    quantiser: Quantiser | None = None
    error_quantised: float | None = None


@dataclass(frozen=True)
class Fit:
    """The weights of a model that are to be pruned, and how: a `fitting.Fitting`.

    Attributes:
        recipe: how.
        weights: by name.
        note: told what the user should know.
        keeps_dense: why a weight of a type with so many non-zeros would not be stored sparse, and so is not pruned.
    """

    recipe: Recipe
    weights: Mapping[str, Shared]
    note: Note
    keeps_dense: Callable[[Shared, torch.dtype, int], str] = field(repr=False)

    def path(self, key: str) -> str:
        """The name of the first linear that reads a weight."""
        return self.weights[key].path

    def parts(self, key: str) -> Parts:
        """The linears that it is made of."""
        return self.weights[key].parts

    @property
    def statistic(self) -> type[ActNorm] | type[Hessian]:
        """What is gathered of inputs."""
        plain = self.recipe.update == "none" and self.recipe.score != "hessian" and not sweeps(self.recipe)
        return ActNorm if plain else Hessian


def fit_section(
    fit: Fit,
    section: Section,
    seen: Mapping[Reading, ActNorm | Hessian],
    keep_new: Callable[[Shared, Tensor], Callable[[], Tensor]],
) -> Iterator[tuple[str, Fitted | str]]:
    """Prune the weights of a section; for those that stay as they are the reason is returned.

    Before:  W of every linear, as the model holds it
    After:   W' with the zeros of the recipe's pattern, and what is left fitted to the inputs; on its grid where there
             is one
    Left alone: weights that are zero everywhere, or would be, and those that ``fit.keeps_dense`` names.
    Numerics: float32 from the values read (codes are dequantised); the result is rounded to the weight's type.

    Args:
        fit: the weights and the recipe.
        section: which of them.
        seen: the statistics of its readings.
        keep_new: stores a new weight; what it returns reads it again.

    Raises:
        InputError: weights or activations hold NaN, or a Hessian has no inverse.
    """
    dense: dict[str, Tensor] = {}
    keep: dict[str, Tensor] = {}
    score: dict[str, Tensor] = {}
    recipe = fit.recipe
    for weight in section.weights:
        values = weight.linears[0].weight.read()
        if not bool(values.isfinite().all()):
            raise InputError(f"{weight.path}: its weight holds NaN or infinity")
        kept_numbers = round((1 - recipe.pattern.sparsity) * values.numel())
        why = fit.keeps_dense(weight, values.dtype, kept_numbers) if bool(values.any()) else ZERO
        if why:
            yield weight.name, why
            continue
        own = score_of(values, weight.parts, recipe, *_inputs_of(fit, weight, seen))
        kept = keep_of(own, weight.parts, recipe)
        if not bool((kept & (values != 0)).any()):
            yield weight.name, EMPTY
            continue
        dense[weight.name], keep[weight.name], score[weight.name] = values, kept, own
    if not dense:
        return
    hessian = None
    if fit.statistic is Hessian:
        hessian = _sum([_matrix(fit, section, seen[reading]) for reading in section.weights[0].fitted_to])
    masked = {key: torch.where(keep[key], dense[key], 0.0) for key in dense}  # literal +0.0, never -0.0
    updated = {}
    if recipe.update != "none":
        assert hessian is not None
        targets = {key: target_of(recipe, keep[key], recipe.pattern) for key in dense}
        updated = update_alike(fit, dense, keep, targets, hessian)
    for key, original in dense.items():
        weight, done = fit.weights[key], updated.get(key)
        new, kept = (masked[key], keep[key]) if done is None else (done.weight, done.keep)
        on_grid, moved = None, None
        if sweeps(recipe) and bool(new.any()):
            assert hessian is not None
            assert recipe.quantise is not None
            factor = weight.linears[0].alpha  # the grid is that of what is packed
            scaled, storages = {key: new.float() * factor}, {key: recipe.quantise.storage}
            gridded, value = quantise_alike(fit, scaled, storages, {key: kept}, hessian, {})[key]
            new = (value / factor).to(new.dtype)
            on_grid = for_packing(gridded, recipe.pattern)
            moved = relative_error(new.float(), original.float(), hessian)
        yield (
            key,
            Fitted(
                read=keep_new(weight, new),
                origin=digest(original),
                retained_before=masks.retained(score[key], keep[key]),
                retained_after=masks.retained(score[key], kept),
                error_before=None if done is None else done.error_before,
                error_after=None if done is None else done.error_after,
                refused="" if done is None else done.refused,
                directions=None if done is None else done.directions,
                on_grid=on_grid,
                quantiser=recipe.quantise.method if recipe.quantise and on_grid else None,
                error_quantised=moved,
            ),
        )


def digest(weight: Tensor) -> str:
    """What tells a weight from every other one, and from its transpose."""
    return hashlib.sha256(repr((weight.shape, weight.dtype)).encode() + as_bytes(weight)).hexdigest()


def score_of(weight: Tensor, parts: Parts, recipe: Recipe, norm: Tensor | None, inverse: Tensor | None) -> Tensor:
    """How much each number of a weight matters.

    Args:
        weight: ``[out_features, in_features]``.
        parts: the linears that it is made of: RIA's column sums are those of one linear.
        recipe: which score.
        norm: the norms of its inputs; None where they are not known, and RIA then goes by the weight alone.
        inverse: the diagonal of the inverse of the damped Hessian, where the score is of it.
    """
    if recipe.score == "magnitude":
        return scores.magnitude(weight)
    if recipe.score == "hessian":
        assert inverse is not None
        return scores.hessian(weight, inverse)
    if recipe.score == "wanda":
        assert norm is not None
        return scores.wanda(weight, norm)
    known, power = (torch.ones(weight.shape[1]), 0.0) if norm is None else (norm, recipe.ria_power)
    return parts.joined([scores.ria(rows, known, power) for rows in parts.split(weight)])


def keep_of(score: Tensor, parts: Parts, recipe: Recipe) -> Tensor:
    """The keep mask of the best scores, of each of the linears that a weight is made of."""
    group = GROUPS[recipe.score]
    return parts.joined([masks.keep_mask(rows, recipe.pattern, group) for rows in parts.split(score)])


def _inputs_of(
    fit: Fit, weight: Shared, seen: Mapping[Reading, ActNorm | Hessian]
) -> tuple[Tensor | None, Tensor | None]:
    """The norms of what a weight's linears read, all together; for a score of the Hessian its inverse's diagonal."""
    statistics = [seen[reading] for reading in weight.inputs]
    try:
        norms = [each.norm() for each in statistics]
        norm = norms[0]
        if len(norms) > 1:
            norm = torch.stack([each.double() for each in norms]).norm(dim=0).float()
        if fit.recipe.score != "hessian":
            return norm, None
        whole = _sum([each.matrix() for each in statistics if isinstance(each, Hessian)])
        return norm, damped_inverse(whole, scores.HESSIAN_DAMPING).matrix.diagonal().clone()
    except ValueError as error:
        raise InputError(f"{weight.path}: {error}") from error


def _matrix(fit: Fit, section: Section, statistic: ActNorm | Hessian) -> Tensor:
    assert isinstance(statistic, Hessian)
    try:
        return statistic.matrix()
    except ValueError as error:
        raise InputError(f"{section.weights[0].path}: {error}") from error


def _sum(matrices: Sequence[Tensor]) -> Tensor:
    return sum(matrices[1:], matrices[0])
