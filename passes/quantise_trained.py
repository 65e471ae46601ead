"""Put the weights of a whole model on their grids once they are trained."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..calibrate.patterns import Pattern
from .block import Block, propagate
from .frontend.batches import Batch
from .fx.attended import find_attended
from .fx.partition import Partition
from .fx.run import shared_names, start, walk
from .observe import observe
from .quantise import Gridded, quantise_block, quantised_errors
from .recipe import BlockReport, Note, Progress, Recipe, Timings


def quantise_trained(
    partition: Partition,
    params: MutableMapping[str, Tensor],
    reports: Sequence[BlockReport],
    recipe: Recipe,
    batches: Sequence[Batch],
    *,
    progress: Progress,
    note: Note,
    timings: Timings,
    quantised: MutableMapping[str, Gridded],
    patterns: Mapping[str, Pattern],
) -> list[BlockReport]:
    """Quantise the pruned weights block by block, each on what the blocks before it, quantised, hand on.

    The block's own output on that is not what it was trained on, so this is for weights that are trained again after.

    Before:  W with zeros, floats
    After:   W with the same zeros, on a grid
    Left alone: see `quantise_block`.
    Numerics: activations are not rounded here.

    Args:
        partition: the model.
        params: weights by key, pruned; replaced by weights on the grid.
        reports: what pruning reported.
        recipe: with ``quantise``.
        batches: the calibration batches.
        progress: told about every block.
        note: told what the user should know.
        timings: seconds per stage are added here.
        quantised: the weights that were quantised are added here with their grids, by key.
        patterns: what the weights were pruned to, by key.

    Returns:
        The reports with how each linear was quantised, and its error against the weights before.

    Raises:
        InputError: see `quantise_block`.
    """
    assert recipe.quantise is not None
    reasons = {linear.path: linear.reason for report in reports for linear in report.linears}
    shared = shared_names(partition)
    states = [start(partition, batch.inputs) for batch in batches]
    found = []
    for (part, kept), report in zip(walk(partition, params, states), reports, strict=True):
        attended = find_attended(part) if recipe.hessian == "attended" else {}
        block = Block(
            part,
            partition.params,
            recipe,
            reasons,
            {},
            (),
            shared,
            kept,
            target=0,
            note=note,
            progress=progress,
            timings=timings,
            attended=attended,
        )
        with timings.stage("observe"):
            observed = observe(block, params, states, batches)
        with timings.stage("quantise"):
            before = {linear.weight: params[linear.weight] for linear in block.pruned}
            keep = {key: weight != 0 for key, weight in before.items()}
            done = quantise_block(block, params, keep, patterns, observed, {})
            errors = quantised_errors(block, params, before, done, observed)
        quantised.update(done)
        with timings.stage("propagate"):
            propagate(block, params, states, observed.outputs)
        keys = {linear.path: linear.weight for linear in block.pruned}
        linears = tuple(
            replace(x, quantiser=recipe.quantise.method, error_quantised=errors.get(keys[x.path]))
            if keys.get(x.path) in done
            else x
            for x in report.linears
        )
        found.append(replace(report, linears=linears))
        progress("quantising", len(found), len(reports))
    return found
