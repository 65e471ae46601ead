"""Prune a traced model block by block, on the pruned path, and check every step.

The order of the passes, each of which may rely on those before it:

1. observe: activation norms of every distinct linear input of the block, in float32, weighted by tokens;
2. permute: channel orders that keep the most score, folded into the block's own weights and checked;
3. mask: zeros where the score is lowest;
4. propagate: the pruned block's outputs become the next block's inputs, and tell its error.
"""

import fnmatch
import time
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..calibrate import masks, scores
from ..calibrate.patterns import NM, Pattern
from ..calibrate.permute import find_order
from ..calibrate.statistics import ActNorm
from .equivalence import compare
from .errors import InputError, VerificationError
from .frontend.batches import Batch
from .frontend.trace import PREFIX
from .fx.channels import find_channel_spaces
from .fx.fold import aligned, apply_fold, stack_scores
from .fx.linears import Linear
from .fx.partition import Part, Partition
from .fx.run import Values, live_after, observe_part, run_part, run_part_float64, start

Score = Literal["ria", "wanda", "magnitude"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Recipe:
    """How to prune.

    Attributes:
        pattern: the zeros to make.
        score: which score ranks the weights.
        ria_power: exponent of the activation norms in RIA.
        permute: fold channel orders where the graph allows it (N:M only), or not at all.
        skip: glob patterns of module paths that stay dense.
    """

    pattern: Pattern
    score: Score = "ria"
    ria_power: float = 0.5
    permute: Literal["fold", "none"] = "fold"
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoldReport:
    """One channel order that was folded: what it moved and what it gained."""

    name: str
    channels: int
    retained_before: float
    retained_after: float


@dataclass(frozen=True)
class LinearReport:
    """What became of one linear inside a block.

    Attributes:
        path: module path.
        shape: ``(out_features, in_features)``.
        pattern: the pattern made, or None if it was left dense.
        reason: why it was left dense; "" if it was pruned.
        retained_before: retained score with the channels in their original order.
        retained_after: retained score as pruned.
        sparsity: fraction of zeros as counted.
    """

    path: str
    shape: tuple[int, int]
    pattern: str | None
    reason: str
    retained_before: float | None = None
    retained_after: float | None = None
    sparsity: float = 0.0


@dataclass(frozen=True)
class BlockReport:
    """One block: its linears, its folds, and how far its output moved.

    Attributes:
        error: ``||pruned - dense|| / ||dense||`` of the block's output, both on the pruned path's inputs.
    """

    path: str
    linears: tuple[LinearReport, ...]
    folds: tuple[FoldReport, ...]
    error: float


@dataclass
class Timings:
    """Seconds spent in each stage of pruning."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, since: float) -> None:
        """Add the time since ``since`` (of ``time.perf_counter``) to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - since


def prune(
    partition: Partition,
    params: MutableMapping[str, Tensor],
    recipe: Recipe,
    batches: Sequence[Batch],
    *,
    cache: Sequence[tuple[str, str]] = (),
    progress: Progress = lambda stage, done, total: None,
    timings: Timings | None = None,
) -> list[BlockReport]:
    """Prune every block of ``partition``, replacing the pruned weights in ``params``.

    Args:
        partition: the model.
        params: weights by key; replaced entry by entry, never written in place.
        recipe: what to make.
        batches: calibration batches; the first tokens of the first one also check the folds.
        cache: (past, present) names that carry the KV cache; see ``find_channel_spaces``.
        progress: told about every block.
        timings: seconds per stage are added here.

    Raises:
        InputError: nothing can be pruned, ``skip`` matches nothing, weights or activations hold NaN, or the batches
            hold nothing but padding.
        VerificationError: a fold changed what its block computes.
    """
    timings = timings or Timings()
    chosen = _choose(partition, recipe)
    alive = live_after(partition)
    readers = Counter(name for part in partition.parts for name in part.inputs)
    shared = {name for name, count in readers.items() if count > 1}
    states = [start(partition, batch.inputs) for batch in batches]
    check = start(partition, batches[0].head().inputs)
    reports: list[BlockReport] = []
    for index, part in enumerate(partition.parts):
        if part.path:
            reasons = {linear.path: chosen[linear.path] for linear in part.linears}
            block = _Block(part, partition.params, params, recipe, reasons, cache, shared, timings)
            reports.append(block.prune(states, batches, check))
            progress("pruning", len(reports), len(partition.blocks))
        elif not reports:  # the prologue; what follows the last block is nobody's input
            for values in [*states, check]:
                values.update(run_part(part, values, params, partition.params))
        for values in [*states, check]:
            for name in [n for n in values if n not in alive[index]]:
                del values[name]
    return reports


def _choose(partition: Partition, recipe: Recipe) -> dict[str, str]:
    """Why each linear stays dense, by path; "" for those that will be pruned."""
    linears = [linear for part in partition.blocks for linear in part.linears]
    for glob in recipe.skip:
        if not any(fnmatch.fnmatchcase(linear.path, glob) for linear in linears):
            raise InputError(f"--skip {glob} matches none of the {len(linears)} linears, e.g. {linears[0].path}")
    chosen = {}
    for linear in linears:
        chosen[linear.path] = ""
        if any(fnmatch.fnmatchcase(linear.path, glob) for glob in recipe.skip):
            chosen[linear.path] = "skipped by --skip"
        elif isinstance(recipe.pattern, NM) and linear.in_features % recipe.pattern.m:
            chosen[linear.path] = f"in_features {linear.in_features} is not a multiple of {recipe.pattern.m}"
    if all(chosen.values()):
        raise InputError(f"no linear is left to prune; {linears[0].path}: {chosen[linears[0].path]}")
    return chosen


class _Block:
    """The passes over one block; holds what they share."""

    def __init__(
        self,
        part: Part,
        names: Mapping[str, str],
        params: MutableMapping[str, Tensor],
        recipe: Recipe,
        reasons: Mapping[str, str],
        cache: Sequence[tuple[str, str]],
        shared: set[str],
        timings: Timings,
    ) -> None:
        self.part = part
        self.names = names
        self.params = params
        self.recipe = recipe
        self.pruned = [linear for linear in part.linears if not reasons[linear.path]]
        self.reasons = reasons
        self.cache = cache
        self.timings = timings
        self.shared = shared
        state = {present for _, present in cache}  # the cache may be reordered; everything else must stay
        self.judged = [name for name in part.outputs if name and name not in state]

    def prune(self, states: list[Values], batches: Sequence[Batch], check: Values) -> BlockReport:
        began = time.perf_counter()
        norms, dense = self._observe(states, batches)
        self.timings.add("observe", began)

        began = time.perf_counter()
        score = {linear.weight: self._score(linear, norms[linear.input]) for linear in self.pruned}
        before = {w: masks.retained(s, self._keep(s)) for w, s in score.items()}
        self.timings.add("score", began)
        folds = self._permute(score, check)

        began = time.perf_counter()
        linears = []
        for linear in self.part.linears:
            shape = (linear.out_features, linear.in_features)
            if reason := self.reasons[linear.path]:
                linears.append(LinearReport(linear.path, shape, None, reason))
                continue
            keep = self._keep(score[linear.weight])
            after = masks.retained(score[linear.weight], keep)
            weight = torch.where(keep, self.params[linear.weight], 0.0)  # literal +0.0, never -0.0
            self.params[linear.weight] = weight
            zeros = 1 - int(weight.count_nonzero()) / weight.numel()
            pattern = str(self.recipe.pattern)
            linears.append(LinearReport(linear.path, shape, pattern, "", before[linear.weight], after, zeros))
        self.timings.add("mask", began)

        began = time.perf_counter()
        error = self._propagate(states, dense)
        check.update(run_part(self.part, check, self.params, self.names))
        self.timings.add("propagate", began)
        return BlockReport(self.part.path, tuple(linears), tuple(folds), error)

    def _observe(self, states: list[Values], batches: Sequence[Batch]) -> tuple[dict[str, Tensor], list[Values]]:
        """Activation norms by input node, and the dense block's outputs for every batch."""
        statistics = {linear.input: ActNorm(linear.in_features) for linear in self.pruned}
        first = {linear.input: linear for linear in reversed(self.pruned)}
        dense = []
        for values, batch in zip(states, batches, strict=True):

            def see(node: str, x: Tensor, mask: Tensor | None = batch.token_mask) -> None:
                tokens = None if mask is None else mask.reshape(x.shape[:-1])
                try:
                    statistics[node].update(x, tokens)
                except ValueError as error:
                    raise InputError(f"{first[node].path}: {error}") from error

            look = {node: lambda x, node=node: see(node, x) for node in statistics}
            results = observe_part(self.part, values, self.params, self.names, look)
            dense.append({name: value for name, value in results.items() if name in self.judged})
        norms = {}
        for node, statistic in statistics.items():
            try:
                norms[node] = statistic.norm()
            except ValueError as error:
                raise InputError(f"{first[node].path}: {error}") from error
        return norms, dense

    def _score(self, linear: Linear, norm: Tensor) -> Tensor:
        weight = self.params[linear.weight]
        try:
            if self.recipe.score == "magnitude":
                return scores.magnitude(weight)
            if self.recipe.score == "wanda":
                return scores.wanda(weight, norm)
            return scores.ria(weight, norm, self.recipe.ria_power)
        except ValueError as error:
            raise InputError(f"{linear.path}: {error}") from error

    def _keep(self, score: Tensor) -> Tensor:
        pattern = self.recipe.pattern
        if isinstance(pattern, NM):
            return masks.nm_keep_mask(score, pattern)
        group = {"ria": scores.RIA_GROUP, "wanda": scores.WANDA_GROUP, "magnitude": scores.MAGNITUDE_GROUP}
        return masks.fraction_keep_mask(score, pattern.sparsity, group[self.recipe.score])

    def _permute(self, score: dict[str, Tensor], check: Values) -> list[FoldReport]:
        """Find and fold the channel orders that keep the most score; ``score`` moves along with the weights.

        Before:  y = W2 f(W1 x)                     f acts on every channel alike
        After:   y = W2[:, p] f(W1[p] x)            p puts the channels that compete for a group far apart
        Left alone: spaces whose consumers are not pruned or do not start at a multiple of m.
        Numerics: the same products; only the sum over the channels runs in another order.
        """
        pattern = self.recipe.pattern
        if self.recipe.permute == "none" or not isinstance(pattern, NM):
            return []
        began = time.perf_counter()
        # A weight that another block reads as well must not move: the check of this block would not see it.
        own = {n: self.names[o] for n, o in self._placeholders() if o in self.names and o not in self.shared}
        spaces = find_channel_spaces(self.part.module, own, cache=self._inner_cache())
        self.timings.add("channel spaces", began)
        folds = []
        expected: tuple[Values, Values] | None = None
        for space in spaces:
            if not aligned(space, pattern.m) or not any(c.param in score for c in space.consumers):
                continue
            began = time.perf_counter()
            found = find_order(stack_scores(space, score), pattern)
            self.timings.add("permutation search", began)
            if found.is_identity:
                continue
            began = time.perf_counter()
            folded = dict(self.params)
            apply_fold(space, found.order, folded)
            if expected is None:
                plain = run_part(self.part, check, self.params, self.names)
                expected = plain, run_part_float64(self.part, check, self.params, self.names)
            got = run_part(self.part, check, folded, self.names)
            for name in self.judged:
                if isinstance(got[name], Tensor) and got[name].is_floating_point():
                    close = compare(got[name], expected[0][name], expected[1][name], factor=4.0)
                    if not close.ok:
                        raise VerificationError(f"{self.part.path}: folding {space.name} changed its output: {close}")
            self.params.update(folded)
            apply_fold(space, found.order, score, only_present=True)
            folds.append(
                FoldReport(space.name.removeprefix(PREFIX), space.size, found.retained_before, found.retained_after)
            )
            self.timings.add("fold", began)
        return folds

    def _placeholders(self) -> list[tuple[str, str]]:
        """Inner and outer name of every argument of the block."""
        inner = [n.name for n in self.part.module.graph.nodes if n.op == "placeholder"]
        return list(zip(inner, self.part.inputs, strict=True))

    def _inner_cache(self) -> list[tuple[str, str]]:
        """The block's (past, present) pairs as the names its own graph uses."""
        inside = {outer: inner for inner, outer in self._placeholders()}
        results = self.part.module.graph.output_node().args[0]
        results = results if isinstance(results, tuple | list) else (results,)
        inside |= {name: node.name for name, node in zip(self.part.outputs, results, strict=True) if name}
        return [(inside[a], inside[b]) for a, b in self.cache if a in inside and b in inside]

    def _propagate(self, states: list[Values], dense: list[Values]) -> float:
        """Run the pruned block on every batch; the relative error of its outputs against the dense ones."""
        wrong = size = 0.0
        for values, reference in zip(states, dense, strict=True):
            values.update(run_part(self.part, values, self.params, self.names))
            for name in self.judged:
                if isinstance(reference[name], Tensor) and reference[name].is_floating_point():
                    wrong += float((values[name] - reference[name]).norm() ** 2)
                    size += float(reference[name].norm() ** 2)
            reference.clear()
        return (wrong / size) ** 0.5 if size else 0.0
