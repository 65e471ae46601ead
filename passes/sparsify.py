"""Everything that a recipe does to a model: the blocks one by one, then all of them together."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .dialect.packed import OnGrid
from .distil import Output, distil
from .frontend.batches import Batch
from .fx.partition import Partition
from .pipeline import prune
from .quantise import Gridded, for_packing
from .recipe import BlockReport, DistilReport, Note, Progress, Recipe, Timings


@dataclass(frozen=True)
class Sparsified:
    """What was done.

    Attributes:
        blocks: every block's report.
        distilled: what training all blocks together made of the model, or None where the recipe does not ask for it.
        on_grid: what packing has to know of the weights that were quantised, by key.
    """

    blocks: tuple[BlockReport, ...]
    distilled: DistilReport | None
    on_grid: dict[str, OnGrid]


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
) -> Sparsified:
    """Prune the blocks of ``partition``, and distil if the recipe says so; arguments as ``prune`` and ``distil`` say.

    Raises:
        InputError: see ``prune`` and ``distil``.
        VerificationError: a fold changed what its block computes.
    """
    timings = timings or Timings()
    quantised: dict[str, Gridded] = {}
    dense = dict(params) if recipe.distil else {}
    blocks = prune(
        partition,
        params,
        recipe,
        batches,
        cache=cache,
        progress=progress,
        note=note,
        timings=timings,
        quantised=quantised,
    )
    distilled = None
    if recipe.distil is not None:
        done = {linear.path for block in blocks for linear in block.linears if linear.pattern is not None}
        keys = [linear.weight for part in partition.blocks for linear in part.linears if linear.path in done]
        with timings.stage("distil"):
            distilled = distil(
                partition,
                dense,
                params,
                keys,
                batches,
                recipe.distil,
                output=output,
                quantised=quantised,
                progress=progress,
            )
    return Sparsified(tuple(blocks), distilled, {key: for_packing(its) for key, its in quantised.items()})
