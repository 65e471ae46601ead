"""Which experts a run chose, and what a model computes when it is made to choose the same.

A choice is a jump: where two experts rank almost alike, rounding decides, and what follows is another sum of other
experts. Two right runs then differ by more than any rounding. So the truth that a file is judged by follows the file's
own choices, and the choices are judged by themselves: an expert that was chosen may rank below one that was not by as
much as rounding moves ranks, and no more.
"""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.fx import Node

from ..passes.equivalence import Closeness, compare_model
from ..passes.frontend.batches import Batch
from ..passes.fx.experts import BY_TOKEN
from ..passes.fx.partition import Part, Partition
from ..passes.fx.run import Values, live_after, start

aten = torch.ops.aten
Chosen = tuple[Tensor, ...]
"""The indices that every ranking of a model made, ``[tokens, ..]`` each, in the order of the rankings."""


@dataclass(frozen=True)
class Route:
    """One run.

    Attributes:
        outputs: the float outputs.
        chosen: what every ranking chose.
        scores: what every ranking ranked, along its last axis.
    """

    outputs: tuple[Tensor, ...]
    chosen: Chosen
    scores: tuple[Tensor, ...]


@dataclass(frozen=True)
class Routing:
    """A model whose rankings are known by name, and can be told what to choose.

    Attributes:
        partition: the model.
        rankings: how many there are; 0 for models without experts.
        told: the same parts, which return what they chose and ranked as well.
        led: the same parts, which take what to choose, and return what they ranked.
    """

    partition: Partition
    rankings: int = 0
    told: Partition | None = None
    led: Partition | None = None

    def run(
        self, params: Mapping[str, Tensor], batch: Batch, run: Callable[..., Values], given: Chosen | None = None
    ) -> Route:
        """Run all parts one after the other, as ``run`` runs one of them; told what to choose where ``given``."""
        partition = (self.told if given is None else self.led) or self.partition
        values = start(partition, batch.inputs)
        values |= {f"{i}.given": chosen for i, chosen in enumerate(given or ())}
        found: dict[str, Tensor] = {}
        names = {f"{i}.{what}" for i in range(self.rankings) for what in ("chosen", "scores")}
        for part, needed in zip(partition.parts, live_after(partition), strict=True):
            values.update(run(part, values, params, partition.params))
            found |= {name: values[name] for name in names & values.keys()}
            for dead in [name for name in values if name not in needed and name not in partition.outputs]:
                del values[dead]
        outputs = tuple(values[name] for name in partition.outputs if values[name].is_floating_point())
        indices = range(self.rankings)
        chosen = tuple(found[f"{i}.chosen"] for i in indices) if given is None else given
        return Route(outputs, chosen, tuple(found[f"{i}.scores"] for i in indices))


def routing_of(partition: Partition) -> Routing:
    """Find the rankings of a model with experts that ``topk`` makes; another way to rank is left as it is."""
    if not any(n.target is BY_TOKEN for part in partition.parts for n in part.module.graph.nodes):
        return Routing(partition)
    told, led, count = [], [], 0
    for part in partition.parts:
        own = _rankings(part)
        told.append(_telling(part, count) if own else part)
        led.append(_led(part, count) if own else part)
        count += len(own)
    return Routing(partition, count, replace(partition, parts=tuple(told)), replace(partition, parts=tuple(led)))


def _rankings(part: Part) -> list[Node]:
    """``topk`` along the last axis, in execution order."""
    found = [node for node in part.module.graph.nodes if node.target is aten.topk.default]
    return [node for node in found if _axis(node) in (-1, _input(node).meta["val"].dim() - 1)]


def _axis(node: Node) -> int:
    args: Any = node.args
    return int(args[2]) if len(args) > 2 else int(node.kwargs.get("dim", -1))  # type: ignore[arg-type]


def _input(node: Node) -> Node:
    found = node.args[0]
    assert isinstance(found, Node)
    return found


def _returning(part: Part, more: Mapping[str, Node], inputs: Sequence[str] = ()) -> Part:
    """A part whose graph was changed: it returns more, and takes more."""
    output = part.module.graph.output_node()
    results: Any = output.args[0]
    results = tuple(results) if isinstance(results, tuple | list) else (results,)
    output.args = ((*results, *more.values()),)
    part.module.graph.lint()
    part.module.recompile()
    return replace(part, inputs=(*part.inputs, *inputs), outputs=(*part.outputs, *more))


def _telling(part: Part, first: int) -> Part:
    part = replace(part, module=copy.deepcopy(part.module))
    graph, more = part.module.graph, {}
    for index, node in enumerate(_rankings(part), first):
        with graph.inserting_after(node):
            more[f"{index}.chosen"] = graph.call_function(operator.getitem, (node, 1))
        more[f"{index}.scores"] = _input(node)
    return _returning(part, more)


def _led(part: Part, first: int) -> Part:
    part = replace(part, module=copy.deepcopy(part.module))
    graph, more, inputs = part.module.graph, {}, []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for index, node in enumerate(_rankings(part), first):
        with graph.inserting_after(last):
            last = graph.placeholder(f"given_{index}")
        inputs.append(f"{index}.given")
        with graph.inserting_after(node):
            values = graph.call_function(aten.gather.default, (_input(node), -1, last))
        more[f"{index}.scores"] = _input(node)
        for user in list(node.users):
            if user is not values:
                user.replace_all_uses_with(last if user.args[1] == 1 else values)
                graph.erase_node(user)
        graph.erase_node(node)
    return _returning(part, more, inputs)


def same(one: Chosen, other: Chosen, batch: Batch) -> bool:
    """Whether two runs chose the same for every token that counts."""
    return all(torch.equal(_counted(a, batch), _counted(b, batch)) for a, b in zip(one, other, strict=True))


def in_order(exact: Route, baseline: Route, batch: Batch) -> Closeness:
    """How far below what was left the choices of a run rank, against how far rounding moves what is ranked.

    Args:
        exact: the float64 run, led by the choices.
        baseline: the plain run, led by them as well.
        batch: what they read.
    """
    worst = Closeness(0.0, 0.0)
    for chosen, true, plain in zip(exact.chosen, exact.scores, baseline.scores, strict=True):
        scores, own = _counted(true, batch).double(), _counted(chosen, batch)
        lowest = scores.gather(-1, own).amin(dim=-1)
        best = scores.scatter(-1, own, -torch.inf).amax(dim=-1)
        behind = float((best - lowest).clamp(min=0).max()) if scores.numel() else 0.0
        ranked = scores.isfinite()  # what is out of question is told by -inf
        rounded = _counted(plain, batch)
        allowed = compare_model(rounded[ranked], rounded[ranked], scores[ranked]).budget
        # Each of two scores may have moved as far, in opposite directions.
        if behind - 2 * allowed > worst.error - worst.budget:
            worst = Closeness(behind, 2 * allowed)
    return worst


def _counted(value: Tensor, batch: Batch) -> Tensor:
    """The rows of tokens that are no padding."""
    mask = batch.token_mask
    rows = value.reshape(-1, value.shape[-1])
    if mask is None or mask.numel() != len(rows):
        return rows
    return rows[mask.reshape(-1)]


@dataclass(frozen=True)
class Told:
    """A copy of a file that returns what it chose as well.

    Attributes:
        path: the copy; it reads the weights of the file.
        names: of the outputs that are the choices, by the order of the rankings; () where they cannot be told.
    """

    path: Path
    names: tuple[str, ...] = field(default=())

    def __enter__(self) -> "Told":
        return self

    def __exit__(self, *error: object) -> None:
        if self.names:
            self.path.unlink(missing_ok=True)


def telling(path: Path, rankings: int) -> Told:
    """The file with the indices of its ``TopK`` nodes as further outputs; itself where these are not the rankings."""
    if not rankings:
        return Told(path)
    proto = onnx.load(str(path), load_external_data=False)
    names = tuple(node.output[1] for node in proto.graph.node if node.op_type == "TopK" and len(node.output) == 2)
    if len(names) != rankings or not all(names):
        return Told(path)
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
    copied = path.with_name(f".{path.stem}.told.onnx")
    onnx.save(proto, str(copied))
    return Told(copied, names)
