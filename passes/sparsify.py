"""Everything that a recipe does to a model: the blocks one by one, then all of them together."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ..calibrate.patterns import Pattern
from .checkpoint import Checkpoint, fingerprint
from .dialect.packed import OnGrid
from .distil import distil
from .form import Form
from .frontend.batches import Batch
from .fx.partition import Partition
from .outputs import Output
from .pipeline import prune
from .quantise import Gridded, for_packing
from .quantise_trained import quantise_trained
from .recipe import BlockReport, Distil, DistilReport, Note, Progress, Recipe, Timings


@dataclass(frozen=True)
class Sparsified:
    """What was done.

    Attributes:
        blocks: every block's report.
        distilled: what training all blocks together made of the model: nothing where the recipe does not ask for it,
            and with joint quantisation first that of the floats, then that on the grid.
        on_grid: what packing has to know of the weights that were quantised, by key.
        patterns: the pattern that each pruned weight was given, by key.
        forms: what a budget made of weights, by key.
    """

    blocks: tuple[BlockReport, ...]
    distilled: tuple[DistilReport, ...]
    on_grid: dict[str, OnGrid]
    patterns: dict[str, Pattern]
    forms: dict[str, Form] = field(default_factory=dict)


def sparsify(
    partition: Partition,
    params: MutableMapping[str, Tensor],
    recipe: Recipe,
    batches: Sequence[Batch],
    *,
    output: Output,
    cache: Sequence[tuple[str, str]] = (),
    progress: Progress = lambda stage, done, total: None,
    note: Note = lambda text: None,
    timings: Timings | None = None,
    checkpoint: Path | None = None,
) -> Sparsified:
    """Prune the blocks of ``partition``, and distil if the recipe says so; arguments as ``prune`` and ``distil`` say.

    With ``checkpoint``, a folder, blocks and epochs that are done are kept there, and what is there already is not done
    again; the result is the same to the bit, but where BESA compares with the dense model, to float error.

    Raises:
        InputError: see ``prune`` and ``distil``; or the folder holds another run.
        VerificationError: a fold changed what its block computes.
    """
    timings = timings or Timings()
    quantised: dict[str, Gridded] = {}
    patterns: dict[str, Pattern] = {}
    dense = dict(params) if recipe.distil else {}
    kept = Checkpoint.open(checkpoint, fingerprint(recipe, params, batches, partition)) if checkpoint else None
    late = _trains_before_the_grid(recipe)
    blocks = prune(
        partition,
        params,
        replace(recipe, quantise=None) if late else recipe,
        batches,
        cache=cache,
        progress=progress,
        note=note,
        timings=timings,
        quantised=quantised,
        patterns=patterns,
        checkpoint=kept,
    )
    done = {linear.path for block in blocks for linear in block.linears if linear.pattern is not None}
    keys = [linear.weight for part in partition.blocks for linear in part.linears if linear.path in done]

    def train(settings: Distil, name: str) -> DistilReport:
        with timings.stage("distil"):
            return distil(
                partition,
                dense,
                params,
                keys,
                batches,
                settings,
                output=output,
                quantised=quantised,
                patterns=patterns,
                progress=progress,
                checkpoint=kept,
                name=name,
            )

    distilled = [train(recipe.distil, "distil")] if recipe.distil is not None else []
    if recipe.distil is not None and late:
        blocks = quantise_trained(
            partition,
            params,
            blocks,
            recipe,
            batches,
            progress=progress,
            note=note,
            timings=timings,
            quantised=quantised,
            patterns=patterns,
        )
        distilled.append(train(replace(recipe.distil, moves=None), "distil-on-grid"))
    on_grid = {key: for_packing(its, patterns.get(key)) for key, its in quantised.items()}
    chosen = dict(recipe.forms)
    forms = {x.weight: chosen[x.path] for part in partition.blocks for x in part.linears if x.path in chosen}
    return Sparsified(tuple(blocks), tuple(distilled), on_grid, patterns, forms)


def _trains_before_the_grid(recipe: Recipe) -> bool:
    """Whether the weights are distilled as floats, and then once more on the grid."""
    joint = recipe.quantise is not None and recipe.quantise.method == "joint"
    return joint and recipe.distil is not None
