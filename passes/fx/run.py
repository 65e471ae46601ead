"""Run the parts of a partitioned graph on calibration batches, and look inside a block while it runs."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.fx.node import map_aggregate

from ...calibrate.matmul import linear
from .linears import Linear
from .partition import Part, Partition

aten = torch.ops.aten
Values = dict[str, Any]
"""The live values of one batch by their name in the outer graph: tensors, and sizes as ints."""
NARROW = (torch.float32, torch.float16, torch.bfloat16)
NUMBERS = 1 << 23
"""Of a weight that are float64 at a time."""
Rounding = Callable[[Tensor], Tensor]
"""What becomes of the input of a linear."""


def start(partition: Partition, inputs: tuple[Tensor, ...]) -> Values:
    """The values of a batch before anything ran."""
    return dict(zip(partition.inputs, inputs, strict=True))


def run_part(part: Part, values: Values, params: Mapping[str, Tensor], names: Mapping[str, str]) -> Values:
    """Run one part, its linears by `calibrate.matmul`; returns the values it defines, by outer name.

    Args:
        part: the part.
        values: live values of the batch; not changed.
        params: weights by key.
        names: outer placeholder name to parameter key.
    """
    with torch.no_grad():
        results = Fast(part.module).run(*_arguments(part, values, params, names))
    return _named(part, results)


def advance(
    part: Part, values: Values, params: Mapping[str, Tensor], names: Mapping[str, str], kept: Collection[str]
) -> Values:
    """As ``run_part``; what is to be kept is added to ``values``, and what nothing reads any more leaves them.

    The KV cache is what nobody reads: of all batches it would be as large as what the block hands on, or larger.

    Args:
        part: the part.
        values: live values of the batch; changed.
        params: weights by key.
        names: outer placeholder name to parameter key.
        kept: the names that later parts read; see ``live_after``.
    """
    made = run_part(part, values, params, names)
    values |= {name: value for name, value in made.items() if name in kept}
    for name in [name for name in values if name not in kept]:
        del values[name]
    return made


def run_part_with_grad(
    part: Part,
    values: Values,
    params: Mapping[str, Tensor],
    names: Mapping[str, str],
    rounded: Mapping[str, Rounding] | None = None,
) -> Values:
    """As ``run_part`` or ``run_part_rounded``, differentiable in the weights that require a gradient.

    A gradient passes rounded inputs as if they were not (Bengio, Leonard and Courville 2013, "Estimating or
    Propagating Gradients Through Stochastic Neurons for Conditional Computation": straight through).
    """
    with torch.enable_grad():
        results = _Rounded(part, names, rounded or {}).run(*_arguments(part, values, params, names))
    return _named(part, results)


def observe_part(
    part: Part,
    values: Values,
    params: Mapping[str, Tensor],
    names: Mapping[str, str],
    see: Mapping[str, Callable[[Tensor], None]],
    before: Mapping[str, Callable[[tuple[Any, ...], dict[str, Any]], None]] | None = None,
) -> Values:
    """As ``run_part``, calling ``see[node](value)`` for every named node inside the part as it is computed.

    ``before[node](args, kwargs)`` is called with the arguments of a node before it is.
    """
    with torch.no_grad():
        results = _Observer(part.module, see, before or {}).run(*_arguments(part, values, params, names))
    return _named(part, results)


def run_part_rounded(
    part: Part,
    values: Values,
    params: Mapping[str, Tensor],
    names: Mapping[str, str],
    rounded: Mapping[str, Rounding],
    *,
    fast: bool = True,
) -> Values:
    """As ``run_part``, where linears see coarser inputs: ``rounded`` says by the key of a weight what becomes of x.

    Without ``fast`` linears are torch's own: the error that others' are measured by.
    """
    with torch.no_grad():
        results = _Rounded(part, names, rounded, fast=fast).run(*_arguments(part, values, params, names))
    return _named(part, results)


def run_part_changed(
    part: Part,
    values: Values,
    params: Mapping[str, Tensor],
    names: Mapping[str, str],
    change: Callable[[Linear, Tensor, Tensor], Tensor],
) -> Values:
    """As ``run_part``, where ``change(linear, x, y)`` says what a linear that reads x returns instead of y.

    Gradients are kept where they are enabled: what ``change`` adds may ask for one.
    """
    results = _Changed(part, change).run(*_arguments(part, values, params, names))
    return _named(part, results)


def run_part_float64(part: Part, values: Values, params: Mapping[str, Tensor], names: Mapping[str, str]) -> Values:
    """As ``run_part`` in float64 throughout: the truth that float32 results are measured against.

    Weights become float64 where they are read, so that there is no second, larger copy of all that a part has.
    """
    with torch.no_grad():
        results = _Float64(part.module).run(*_arguments(part, values, params, names))
    return _named(part, results)


def run_model(
    partition: Partition, inputs: tuple[Tensor, ...], params: Mapping[str, Tensor], run: Callable[..., Values]
) -> Tensor:
    """Run all parts one after the other; the model's first output. Values that nothing reads any more are dropped.

    Args:
        partition: the model.
        inputs: of one batch.
        params: weights by key.
        run: how each part is run: `run_part`, `run_part_with_grad`, or another with these four arguments.
    """
    values, name = start(partition, inputs), partition.outputs[0]
    for part, needed in zip(partition.parts, live_after(partition), strict=True):
        values.update(run(part, values, params, partition.params))
        for dead in [n for n in values if n not in needed and n != name]:
            del values[dead]
    found: Tensor = values[name]
    return found


def walk(
    partition: Partition, params: Mapping[str, Tensor], runs: Sequence[Values]
) -> Iterator[tuple[Part, frozenset[str]]]:
    """Every block in order, and the names that later parts read, when ``runs`` hold what the block reads.

    Whoever takes it runs it, by ``advance``, on every one of them.

    Args:
        partition: the model. What follows the last block is not run.
        params: weights by key; those of a block may be replaced while it is out.
        runs: the values of some batches from `start`.
    """
    left = len(partition.blocks)
    for part, kept in zip(partition.parts, live_after(partition), strict=True):
        if part.path:
            left -= 1
            yield part, frozenset(kept)
        elif left:
            for values in runs:
                advance(part, values, params, partition.params, kept)


def shared_names(partition: Partition) -> frozenset[str]:
    """The names that more than one part reads."""
    readers = Counter(name for part in partition.parts for name in part.inputs)
    return frozenset(name for name, count in readers.items() if count > 1)


def live_after(partition: Partition) -> list[set[str]]:
    """For every part, the names that later parts still read; not what only the model returns, such as its KV cache."""
    alive: set[str] = set()
    after = []
    for part in reversed(partition.parts):
        after.append(set(alive))
        alive |= set(part.inputs)
    return after[::-1]


def _arguments(part: Part, values: Values, params: Mapping[str, Tensor], names: Mapping[str, str]) -> list[Any]:
    return [params[names[name]] if name in names else values[name] for name in part.inputs]


def _named(part: Part, results: Any) -> Values:
    if not isinstance(results, tuple | list):
        results = (results,)
    return {name: value for name, value in zip(part.outputs, results, strict=True) if name}


class Fast(Interpreter):
    """Computes linears the fastest way there is."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of one node."""
        return super().call_function(linear if target is torch.ops.aten.linear.default else target, args, kwargs)


class _Observer(Fast):
    """Shows chosen intermediate values, and arguments of chosen nodes, to callbacks."""

    def __init__(
        self,
        module: torch.fx.GraphModule,
        see: Mapping[str, Callable[[Tensor], None]],
        before: Mapping[str, Callable[[tuple[Any, ...], dict[str, Any]], None]],
    ) -> None:
        super().__init__(module)
        self._see = see
        self._before = before

    def run_node(self, n: Node) -> Any:
        if n.name in self._before:
            self._before[n.name](*self.fetch_args_kwargs_from_env(n))
        result = super().run_node(n)
        if n.name in self._see:
            self._see[n.name](result)
        return result


class _Rounded(Fast):
    """Changes the first argument of chosen linears; straight through for gradients."""

    def __init__(
        self, part: Part, names: Mapping[str, str], rounded: Mapping[str, Rounding], *, fast: bool = True
    ) -> None:
        super().__init__(part.module)
        self._fast = fast
        holders = [node for node in part.module.graph.nodes if node.op == "placeholder"]
        keys = {node: names.get(name) for node, name in zip(holders, part.inputs, strict=True)}
        self._change: dict[Node, Rounding] = {}
        for node in part.module.graph.nodes:
            key = keys.get(node.args[1]) if node.target is torch.ops.aten.linear.default else None
            if key is not None and key in rounded:
                self._change[node] = rounded[key]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._fast:
            return super().call_function(target, args, kwargs)
        return Interpreter.call_function(self, target, args, kwargs)

    def run_node(self, n: Node) -> Any:
        if n not in self._change:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        exact = args[0].detach()
        made = self._change[n](exact)
        x = args[0] + (made - exact) if torch.is_grad_enabled() else made
        return self.call_function(n.target, (x, *args[1:]), dict(kwargs))


class _Changed(Fast):
    """Shows what every linear reads and returns, and goes on with what it is given back."""

    def __init__(self, part: Part, change: Callable[[Linear, Tensor, Tensor], Tensor]) -> None:
        super().__init__(part.module)
        self._linears = {linear.node: linear for linear in part.linears}
        self._change = change

    def run_node(self, n: Node) -> Any:
        made = super().run_node(n)
        linear = self._linears.get(n.name)
        return made if linear is None else self._change(linear, self.fetch_args_kwargs_from_env(n)[0][0], made)


class _Float64(Interpreter):
    """Computes in float64 where the graph says float32 or a 16-bit float, casts included."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is aten.embedding.default:  # which rows, and then only those in float64
            return _to_float64(super().call_function(target, args, kwargs))
        if target is aten.linear.default and args[1].numel() > NUMBERS:
            x, weight, bias = (*args, None)[:3]
            rows = max(1, NUMBERS // weight.shape[1])
            biases = [None] * len(weight) if bias is None else [_to_float64(its) for its in bias.split(rows)]
            parts = zip(weight.split(rows), biases, strict=False)
            return torch.cat([aten.linear(_to_float64(x), _to_float64(part), its) for part, its in parts], dim=-1)
        args, kwargs = map_aggregate((args, kwargs), _to_float64)
        return _to_float64(super().call_function(target, args, kwargs))


def _to_float64(value: Any) -> Any:
    """A narrower tensor or dtype as float64, anything else as it is."""
    if isinstance(value, Tensor) and value.dtype in NARROW:
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value
