"""One pass over the pruned model that finds the scale of what every quantised linear reads."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..calibrate.eight_bit import Kind, Magnitudes
from .errors import InputError
from .frontend.batches import Batch
from .fx.linears import Linear
from .fx.partition import Part, Partition
from .fx.run import Values, observe_part, run_model, shared_names
from .recipe import Progress


@dataclass(frozen=True)
class Scaled:
    """The linears that read one value, and its scale.

    Attributes:
        linears: they share the input and with it the scale.
        scale: of the codes of that input, a positive float16 number.
    """

    linears: tuple[Linear, ...]
    scale: float


def scale_activations(
    partition: Partition,
    params: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    paths: Collection[str],
    kind: Kind,
    progress: Progress = lambda stage, done, total: None,
) -> list[Scaled]:
    """Run the pruned model on the calibration batches and choose a scale for the input of every linear in ``paths``.

    Left alone: linears whose weight something else reads as well. Padding does not count.

    Args:
        partition: the model, in float32.
        params: its pruned weights by key.
        batches: what to run; without them no scale can be found.
        paths: module paths of the linears to quantise.
        kind: of the codes.
        progress: told how many batches were run.

    Raises:
        InputError: activations hold NaN or more than float16 does, are all zero, or no token counts.
    """
    groups = {part.path: _groups(part, partition, paths) for part in partition.blocks}
    seen = {(path, node): Magnitudes() for path, nodes in groups.items() for node in nodes}
    for index, batch in enumerate(batches):
        progress("scaling activations", index, len(batches))

        def observe(
            part: Part, values: Values, params: Mapping[str, Tensor], names: Mapping[str, str], its: Batch = batch
        ) -> Values:
            nodes = groups.get(part.path, {})
            look = {n: _look(seen[part.path, n], nodes[n][0].path, its.token_mask) for n in nodes}
            return observe_part(part, values, params, names, look)

        run_model(partition, batch.inputs, params, observe)
    return [
        Scaled(tuple(linears), _scale(seen[path, node], linears[0].path, kind))
        for path, nodes in groups.items()
        for node, linears in nodes.items()
    ]


def _groups(part: Part, partition: Partition, paths: Collection[str]) -> dict[str, list[Linear]]:
    """The linears of a part to quantise, by the node that they read."""
    shared = shared_names(partition)
    holders = [node for node in part.module.graph.nodes if node.op == "placeholder"]
    alone = {
        partition.params.get(name)
        for node, name in zip(holders, part.inputs, strict=True)
        if name not in shared and len(node.users) == 1
    }
    found: dict[str, list[Linear]] = {}
    for linear in part.linears:
        if linear.path in paths and linear.weight in alone:
            found.setdefault(linear.input, []).append(linear)
    return found


def _look(magnitudes: Magnitudes, path: str, token_mask: Tensor | None) -> Callable[[Tensor], None]:
    def see(x: Tensor) -> None:
        try:
            magnitudes.update(x, None if token_mask is None else token_mask.reshape(x.shape[:-1]))
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error

    return see


def _scale(magnitudes: Magnitudes, path: str, kind: Kind) -> float:
    try:
        return magnitudes.scale(kind)
    except ValueError as error:
        raise InputError(f"{path}: {error}; leave it out with --skip {path}, or calibrate on more") from error
