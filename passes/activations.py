"""One pass over the pruned model that finds the scale of what every quantised linear reads."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..calibrate.eight_bit import Kind, Magnitudes
from .errors import InputError
from .frontend.batches import Batch
from .fx.linears import Linear
from .fx.partition import Part, Partition
from .fx.run import live_after, observe_part, start
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
    after = live_after(partition)
    for index, batch in enumerate(batches):
        progress("scaling activations", index, len(batches))
        values = start(partition, batch.inputs)
        for part, needed in zip(partition.parts, after, strict=True):
            nodes = groups.get(part.path, {})
            look = {n: _look(seen[part.path, n], nodes[n][0].path, batch.token_mask) for n in nodes}
            values.update(observe_part(part, values, params, partition.params, look))
            for dead in values.keys() - needed:
                del values[dead]
    return [
        Scaled(tuple(linears), _scale(seen[path, node], linears[0].path, kind))
        for path, nodes in groups.items()
        for node, linears in nodes.items()
    ]


def _groups(part: Part, partition: Partition, paths: Collection[str]) -> dict[str, list[Linear]]:
    """The linears of a part to quantise, by the node that they read."""
    readers = Counter(name for other in partition.parts for name in other.inputs)
    holders = [node for node in part.module.graph.nodes if node.op == "placeholder"]
    alone = {
        partition.params.get(name)
        for node, name in zip(holders, part.inputs, strict=True)
        if readers[name] == len(node.users) == 1
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
