"""Prune a traced model block by block, on the pruned path, and check every step.

The passes over a block, in the order in which each may rely on those before it:

1. observe: statistics of every distinct linear input, and of what attention makes of it, and the dense outputs;
2. score: how much each weight matters;
3. permute: channel orders that keep the most score, folded into the block's own weights and checked;
4. mask: zeros where the score is lowest, the same fraction everywhere or learned for each row (besa.py), or where a
   given mask has them;
5. update: the surviving weights make up for those that are gone, whose choice may be part of it;
6. tune: the surviving weights of each half of the block, trained against the dense block;
7. quantise: every weight to a grid, and for ``joint`` once more 6, of what the grid makes of the weights;
8. propagate: the pruned block's outputs become the next block's inputs, and tell its error.
"""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..calibrate import masks
from ..calibrate.choice import usable
from ..calibrate.patterns import NM, Pattern, Unstructured, find_pattern, parse
from .besa import Examples, learn_masks
from .block import Block, mask, propagate, run_dense, score_block
from .checkpoint import Checkpoint, from_grids, to_grids, to_report
from .errors import InputError
from .fitting import thin
from .frontend.batches import Batch
from .fx.attended import find_attended
from .fx.linears import Linear
from .fx.partition import Partition
from .fx.run import Values, advance, shared_names, start, walk
from .given_masks import masks_by_weight
from .mapped import give_back, mapped
from .observe import observe
from .permute import permute
from .quantise import Gridded, quantise_block, quantised_errors
from .recipe import BlockReport, LinearReport, Note, Progress, Recipe, Timings
from .skip import named_by
from .tune import tune
from .update import update_block


def prune(
    partition: Partition,
    params: MutableMapping[str, Tensor],
    recipe: Recipe,
    batches: Sequence[Batch],
    *,
    cache: Sequence[tuple[str, str]] = (),
    progress: Progress = lambda stage, done, total: None,
    note: Note = lambda text: None,
    timings: Timings | None = None,
    quantised: MutableMapping[str, Gridded] | None = None,
    patterns: MutableMapping[str, Pattern] | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[BlockReport]:
    """Prune every block of ``partition``, replacing the pruned weights in ``params``.

    Args:
        partition: the model.
        params: weights by key; replaced entry by entry, never written in place.
        recipe: what to make.
        batches: calibration batches; the first tokens of the first one also check the folds.
        cache: (past, present) names that carry the KV cache; see ``find_channel_spaces``.
        progress: told about every block.
        note: told what the user should know.
        timings: seconds per stage are added here.
        quantised: the weights that were quantised are added here with their grids, by key.
        patterns: the pattern that each weight was given is added here, by key; it is stored by that.
        checkpoint: every block that is done is kept there; those that are there are only run.

    Raises:
        InputError: nothing can be pruned, ``skip`` matches nothing, a given mask does not fit, weights or activations
            hold NaN, or the batches hold nothing but padding.
        VerificationError: a fold changed what its block computes.
    """
    timings = timings or Timings()
    linears = [linear for part in partition.blocks for linear in part.linears]
    given = masks_by_weight(recipe.given, linears, recipe.pattern) if recipe.given else {}
    reasons = _reasons(linears, recipe, given)
    shared = shared_names(partition)
    states = [start(partition, batch.inputs) for batch in batches]
    check = start(partition, batches[0].head().inputs)
    by_dense_model = recipe.allocation is not None and recipe.allocation.reference == "dense"
    dense = [dict(values) for values in states] if by_dense_model else []
    targets = iter(_targets(partition, recipe, reasons))
    reports: list[BlockReport] = []
    for part, kept in walk(partition, params, [*states, *dense, check]):
        block = Block(
            part,
            partition.params,
            recipe,
            reasons,
            given,
            tuple(cache),
            shared,
            kept,
            target=next(targets),
            note=note,
            progress=progress,
            timings=timings,
            attended=find_attended(part) if recipe.hessian == "attended" else {},
        )
        done = checkpoint.load(f"block-{len(reports)}") if checkpoint else None
        if done is not None:
            report, on_grid, made = _restore_block(block, params, states, dense, check, *done)
        else:
            before = dict(params)
            report, on_grid, made = _prune_block(block, params, states, dense, batches, check)
            changed = {f"params/{key}": new for key, new in params.items() if new is not before[key]}
            tensors, grids = from_grids(on_grid)
            if checkpoint is None:
                held = {name: mapped(new) for name, new in {**changed, **tensors}.items()}
            else:
                held = checkpoint.save(
                    f"block-{len(reports)}",
                    {**changed, **tensors},
                    {
                        "report": asdict(report),
                        "grids": grids,
                        "patterns": {key: str(its) for key, its in made.items()},
                    },
                )
            _take(params, held)
            on_grid = to_grids(held, grids)
            del before, changed, tensors
            give_back()
        reports.append(report)
        if len(reports) == 1 and (thin := _thin(report, batches)):
            note(thin)
        if quantised is not None:
            quantised.update(on_grid)
        if patterns is not None:
            patterns.update(made)
        progress("pruning", len(reports), len(partition.blocks))
    return reports


def _thin(report: BlockReport, batches: Sequence[Batch]) -> str:
    """Say so where calibration shows too little of what linears read; "" where it is enough."""
    seen = [(x.path, x.directions, x.shape[1]) for x in report.linears]
    return thin(seen, f"{report.path}{_told_tokens(batches)}")


def _told_tokens(batches: Sequence[Batch]) -> str:
    """How much text that is, where it is text."""
    if any(batch.inputs[0].is_floating_point() for batch in batches):
        return ""
    seen = [
        batch.inputs[0] if batch.token_mask is None else batch.inputs[0][batch.token_mask.bool()] for batch in batches
    ]
    tokens = torch.cat([x.reshape(-1) for x in seen])
    return f" ({len(tokens)} tokens, {len(set(tokens.tolist()))} of them different)"


def _restore_block(
    block: Block,
    params: MutableMapping[str, Tensor],
    states: list[Values],
    dense: list[Values],
    check: Values,
    tensors: Mapping[str, Tensor],
    notes: Mapping[str, Any],
) -> tuple[BlockReport, dict[str, Gridded], dict[str, Pattern]]:
    """What ``_prune_block`` did before: its weights, and what they make of the batches."""
    run_dense(block, params, dense)
    _take(params, tensors)
    for values in [*states, check]:
        advance(block.part, values, params, block.names, block.kept)
    made = {key: parse(text) for key, text in notes["patterns"].items()}
    return to_report(notes["report"]), to_grids(tensors, notes["grids"]), made


def _take(params: MutableMapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Replace weights by those of a step, which lie in its file and take no memory."""
    params.update({key.removeprefix("params/"): new for key, new in tensors.items() if key.startswith("params/")})


def _prune_block(
    block: Block,
    params: MutableMapping[str, Tensor],
    states: list[Values],
    dense: list[Values],
    batches: Sequence[Batch],
    check: Values,
) -> tuple[BlockReport, dict[str, Gridded], dict[str, Pattern]]:
    """Run all passes over one block; returns its report, its quantised weights and the patterns of all that it pruned.

    Args:
        block: the block.
        params: weights by key; the block's own are replaced.
        states: live values of every batch; the block's outputs are added.
        dense: the same in the dense model, or nothing where no pass compares with it.
        batches: the batches they come from.
        check: live values of the batch that checks folds; the block's outputs are added.
    """
    timings = block.timings
    with timings.stage("observe"):
        observed = observe(block, params, states, batches)
    with timings.stage("score"):
        score = score_block(block, params, observed)
        before = {key: masks.retained(s, mask(block, key, s)) for key, s in score.items()}
    folds = permute(block, params, score, observed, check)
    grids: dict[str, Gridded] = {}
    picks: Mapping[str, NM | None] = {}
    if block.recipe.allocation is not None:
        with timings.stage("learn rates"):
            wanted = run_dense(block, params, dense) if dense else observed.outputs
            learned = learn_masks(block, params, score, Examples(states, wanted, [b.token_mask for b in batches]))
            keep, grids, picks = learned.keep, learned.grids, learned.picks
    with timings.stage("mask"):
        if block.recipe.allocation is None:
            keep = {key: mask(block, key, s) for key, s in score.items()}
    with timings.stage("update"):
        done = update_block(block, params, keep, observed)
        after = {key: masks.retained(score[key], updated.keep) for key, updated in done.items()}
        unpruned = {key: params[key] for key in done}
        params.update({key: updated.weight for key, updated in done.items()})
    whole = {**params, **unpruned}
    with timings.stage("tune"):
        tuned = tune(block, whole, params, states, observed.outputs, batches)
    with timings.stage("quantise"):
        own = {key: updated.keep for key, updated in done.items()}
        patterns = {key: its for key, mask in own.items() if (its := _pattern(block, key, mask, picks.get(key)))}
        quantised = quantise_block(block, params, own, patterns, observed, grids)
    if block.recipe.quantise is not None and block.recipe.quantise.method == "joint":
        with timings.stage("tune on the grid"):
            tuned += tune(block, whole, params, states, observed.outputs, batches, quantised)
    errors = quantised_errors(block, params, unpruned, quantised, observed)
    with timings.stage("propagate"):
        error = propagate(block, params, states, observed.outputs)
        advance(block.part, check, params, block.names, block.kept)
    linears = []
    for linear in block.part.linears:
        shape = (linear.out_features, linear.in_features)
        if reason := block.reasons[linear.path]:
            linears.append(LinearReport(linear.path, shape, None, reason))
            continue
        key = linear.weight
        linears.append(
            LinearReport(
                path=linear.path,
                shape=shape,
                pattern=_told(block, key, patterns.get(key), own[key]),
                reason="",
                retained_before=before[key],
                retained_after=after[key],
                sparsity=1 - int(done[key].weight.count_nonzero()) / done[key].weight.numel(),
                error_before=done[key].error_before,
                error_after=done[key].error_after,
                refused=done[key].refused,
                directions=done[key].directions,
                quantiser=block.recipe.quantise.method if block.recipe.quantise and key in quantised else None,
                error_quantised=errors.get(key),
            )
        )
    return BlockReport(block.part.path, tuple(linears), tuple(folds), error, tuned), quantised, patterns


def _pattern(block: Block, key: str, keep: Tensor, pick: NM | None) -> Pattern | None:
    """The pattern that a weight was given and is to be stored by; None where all of it was kept, or nothing.

    Args:
        block: the block.
        key: the weight.
        keep: its mask.
        pick: the pattern that was learned for it, if patterns were.
    """
    recipe = block.recipe
    if (form := block.form(key)) is not None:
        return form.pattern
    if isinstance(recipe.pattern, NM):
        return recipe.pattern
    if recipe.given is not None:  # nobody said whether these zeros come in groups
        return find_pattern(keep, min_sparsity=0.0)
    if recipe.allocation is not None and recipe.allocation.per == "pattern":
        return pick
    pruned = 1 - int(keep.sum()) / keep.numel()
    return Unstructured(pruned) if 0 < pruned < 1 else None


def _told(block: Block, key: str, pattern: Pattern | None, keep: Tensor) -> str | None:
    """A pattern as the report names it: a fraction that was asked for as it was written, else that of the mask."""
    recipe = block.recipe
    if (form := block.form(key)) is not None:
        return None if form.pattern is None else str(form.pattern)
    if isinstance(pattern, NM):
        return str(pattern)
    if recipe.allocation is None and recipe.given is None:
        return str(recipe.pattern)
    pruned = 1 - int(keep.sum()) / keep.numel()
    return f"{pruned:.3f}" if recipe.allocation else f"{pruned:g}"


def _targets(partition: Partition, recipe: Recipe, reasons: Mapping[str, str]) -> list[int]:
    """How many weights each block is to prune: what is rounded off in one block is made up for in the next."""
    targets, size, before = [], 0, 0
    for part in partition.blocks:
        weights = {linear.weight: linear for linear in part.linears if not reasons[linear.path]}
        size += sum(linear.out_features * linear.in_features for linear in weights.values())
        total = math.floor(recipe.pattern.sparsity * size + 0.5)
        targets.append(total - before)
        before = total
    return targets


def _reasons(linears: Sequence[Linear], recipe: Recipe, given: Mapping[str, Tensor]) -> dict[str, str]:
    """Why each linear stays dense, by path; "" for those that will be pruned."""
    for glob in recipe.skip:
        if not any(named_by(glob, linear.path) for linear in linears):
            raise InputError(f"--skip {glob} matches none of the {len(linears)} linears, e.g. {linears[0].path}")
    reasons, chosen = {}, dict(recipe.forms)
    for linear in linears:
        reasons[linear.path] = ""
        fits = not isinstance(recipe.pattern, NM) or linear.in_features % recipe.pattern.m == 0
        if any(named_by(glob, linear.path) for glob in recipe.skip):
            reasons[linear.path] = "skipped by --skip"
        elif linear.router:
            reasons[linear.path] = "it chooses the experts"
        elif linear.path in chosen:
            continue
        elif linear.path in recipe.budgeted and (chosen or fits):
            reasons[linear.path] = "the budget leaves it dense"
        elif recipe.given and linear.weight not in given:
            reasons[linear.path] = f"{recipe.given.file.name} has no mask for it"
        elif recipe.given and bool(given[linear.weight].all()):
            reasons[linear.path] = f"{recipe.given.file.name} keeps all of it"
        elif isinstance(recipe.pattern, NM) and not fits:
            reasons[linear.path] = f"in_features {linear.in_features} is not a multiple of {recipe.pattern.m}"
        elif not _has_pattern(recipe, linear.in_features):
            names = ", ".join(str(pattern) for pattern in recipe.allocation.patterns) if recipe.allocation else ""
            reasons[linear.path] = f"in_features {linear.in_features} is not a multiple of the groups of {names}"
    if all(reasons.values()) and not recipe.budgeted:
        raise InputError(f"no linear is left to prune; {linears[0].path}: {reasons[linears[0].path]}")
    return reasons


def _has_pattern(recipe: Recipe, in_features: int) -> bool:
    """Whether one of the patterns to learn from, if patterns are learned, fits."""
    learning = recipe.allocation
    return learning is None or learning.per != "pattern" or bool(usable(learning.patterns, in_features))
