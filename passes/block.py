"""One block, and the small passes over it; `pipeline` has them in order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibrate import masks, scores
from ..calibrate.damping import damped_inverse
from ..calibrate.patterns import Group, Pattern
from .errors import InputError
from .form import Form
from .fx.attended import Attended
from .fx.linears import Linear
from .fx.partition import Part
from .fx.run import Values, advance
from .parts import ONE, Parts
from .recipe import Note, Progress, Recipe, Score, Timings

GROUPS: Mapping[Score, Group] = {
    "ria": scores.RIA_GROUP,
    "wanda": scores.WANDA_GROUP,
    "magnitude": scores.MAGNITUDE_GROUP,
    "hessian": scores.HESSIAN_GROUP,
}


@dataclass(frozen=True)
class Block:
    """One block, and what the passes over it share.

    Attributes:
        part: the block.
        names: outer placeholder name to parameter key.
        recipe: how to prune.
        reasons: why a linear stays dense, by path; "" for those that are pruned.
        given: masks to use as they are, by weight key; empty where the score makes them.
        cache: (past, present) names that carry the KV cache.
        shared: names that more than one part reads.
        kept: names that later parts read; nothing else is kept of what the block makes of a batch.
        target: weights to prune, where rates are learned.
        note: told what the user should know.
        progress: told what is being done.
        timings: seconds per stage are added here.
        attended: the linears that are fitted to what attention makes of their inputs, by node.
    """

    part: Part
    names: Mapping[str, str]
    recipe: Recipe
    reasons: Mapping[str, str]
    given: Mapping[str, Tensor]
    cache: tuple[tuple[str, str], ...]
    shared: frozenset[str]
    kept: frozenset[str]
    target: int
    note: Note
    progress: Progress
    timings: Timings
    attended: Mapping[str, Attended] = field(default_factory=dict)

    @property
    def pruned(self) -> list[Linear]:
        """The linears to prune."""
        return [linear for linear in self.part.linears if not self.reasons[linear.path]]

    @property
    def judged(self) -> list[str]:
        """The outputs that must not change; the cache may be reordered."""
        state = {present for _, present in self.cache}
        return [name for name in self.part.outputs if name and name not in state]

    def form(self, key: str) -> Form | None:
        """What a budget made of a weight; None where it has the recipe's pattern."""
        chosen = dict(self.recipe.forms)
        return next((chosen[x.path] for x in self.part.linears if x.weight == key and x.path in chosen), None)

    def pattern(self, key: str) -> Pattern | None:
        """The zeros that a weight is to have; None for a weight that is quantised as it is."""
        form = self.form(key)
        return self.recipe.pattern if form is None else form.pattern

    def path(self, key: str) -> str:
        """The module path of the linear that a weight belongs to; the first of those that share it."""
        return next(linear.path for linear in self.pruned if linear.weight == key)

    def parts(self, key: str) -> Parts:
        """The linears that a weight is made of, such as q, k and v of a fused one, if all that read it agree on it."""
        found = {linear.parts for linear in self.pruned if linear.weight == key}
        return found.pop() if len(found) == 1 else ONE

    def fitted_to(self, linear: Linear) -> str:
        """Whose second moments a linear is fitted to: the node it reads, or its own, for what attention makes of it."""
        return linear.node if linear.node in self.attended else linear.input


@dataclass(frozen=True)
class Observed:
    """What the dense block did on the calibration batches.

    Attributes:
        norms: activation norms by input node.
        hessians: second moments by input node, and by the node of a linear that is fitted to its own; empty where
            neither score, update nor quantiser needs them.
        outputs: the judged outputs, by batch.
    """

    norms: dict[str, Tensor]
    hessians: dict[str, Tensor]
    outputs: list[Values]

    def hessian(self, nodes: Sequence[str]) -> Tensor | None:
        """Some second moments together; None where they are not known."""
        if not self.hessians:
            return None
        return sum((self.hessians[node] for node in nodes[1:]), self.hessians[nodes[0]])


def score_block(block: Block, params: Mapping[str, Tensor], observed: Observed) -> dict[str, Tensor]:
    """The recipe's score of every weight to prune, by key; one that several linears share is scored for all they read.

    Raises:
        InputError: a weight holds NaN, or a Hessian has no inverse.
    """
    readers: dict[str, list[Linear]] = {}
    for linear in block.pruned:
        readers.setdefault(linear.weight, []).append(linear)
    inverses: dict[tuple[str, ...], Tensor] = {}
    found = {}
    for key, linears in readers.items():
        inputs = tuple(dict.fromkeys(linear.input for linear in linears))
        try:
            if block.recipe.score == "hessian" and inputs not in inverses:
                hessian = sum((observed.hessians[x] for x in inputs[1:]), observed.hessians[inputs[0]])
                inverses[inputs] = damped_inverse(hessian, scores.HESSIAN_DAMPING).matrix.diagonal().clone()
            norm = observed.norms[inputs[0]]
            if len(inputs) > 1:  # over the tokens of all of them
                norm = torch.stack([observed.norms[x].double() for x in inputs]).norm(dim=0).float()
            found[key] = _score(block, key, params[key], norm, inverses.get(inputs))
        except ValueError as error:
            raise InputError(f"{linears[0].path}: {error}") from error
    return found


def _score(block: Block, key: str, weight: Tensor, norm: Tensor, inverse: Tensor | None) -> Tensor:
    if block.recipe.score == "magnitude":
        return scores.magnitude(weight)
    if inverse is not None:
        return scores.hessian(weight, inverse)
    if block.recipe.score == "wanda":
        return scores.wanda(weight, norm)
    power = block.recipe.ria_power  # RIA's column sums are those of one linear
    parts = block.parts(key)
    return parts.joined([scores.ria(rows, norm, power) for rows in parts.split(weight)])


def mask(block: Block, key: str, score: Tensor) -> Tensor:
    """The keep mask of one weight: the given one, or that of the best scores at the recipe's rate.

    Where all weights of a linear compete, they do in each of those that a fused one is made of.
    """
    if block.given:
        return block.given[key]
    group, parts, pattern = GROUPS[block.recipe.score], block.parts(key), block.pattern(key)
    if pattern is None:
        return torch.ones_like(score, dtype=torch.bool)
    return parts.joined([masks.keep_mask(rows, pattern, group) for rows in parts.split(score)])


def alike(block: Block, keys: Iterable[str]) -> dict[tuple[str, ...], list[str]]:
    """Weights by the second moments that they are fitted to: those of all the block's linears that they belong to.

    Left out: weights that another block reads as well, which would be fitted to this block's inputs.
    """
    shared = {block.names[name] for name in block.shared if name in block.names}
    groups: dict[tuple[str, ...], list[str]] = {}
    for key in keys:
        if key not in shared:
            inputs = dict.fromkeys(block.fitted_to(linear) for linear in block.pruned if linear.weight == key)
            groups.setdefault(tuple(inputs), []).append(key)
    return groups


def run_dense(block: Block, params: Mapping[str, Tensor], dense: list[Values]) -> list[Values]:
    """Run the block, not yet pruned, on the dense model's batches; the judged outputs, by batch."""
    outputs = []
    for values in dense:
        made = advance(block.part, values, params, block.names, block.kept)
        outputs.append({name: made[name] for name in block.judged})
    return outputs


def propagate(block: Block, params: Mapping[str, Tensor], states: list[Values], dense: list[Values]) -> float:
    """Run the pruned block on every batch; the relative error of its outputs against the dense ones."""
    wrong = size = 0.0
    for values, reference in zip(states, dense, strict=True):
        made = advance(block.part, values, params, block.names, block.kept)
        for name in block.judged:
            if isinstance(reference[name], Tensor) and reference[name].is_floating_point():
                wrong += float((made[name] - reference[name]).norm() ** 2)
                size += float(reference[name].norm() ** 2)
        reference.clear()
    return (wrong / size) ** 0.5 if size else 0.0
