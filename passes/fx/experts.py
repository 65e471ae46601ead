"""Stacks of experts: one linear each while there are weights to move, one op again when they are stored."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, Node

from ..dialect.experts import DENSE
from ..errors import InputError
from ..frontend.trace import PREFIX
from ..mapped import mapped
from .channels import ChannelRange, ChannelSpace
from .products import Turned
from .replace import drop_unused, place_beside, replace_node

aten = torch.ops.aten
_LIBRARY = torch.library.Library("sparsify", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("tokens_of(Tensor x, Tensor ids, int expert) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.define("by_token(Tensor[] found, Tensor ids) -> Tensor")  # type: ignore[no-untyped-call]


def _tokens_of(x: Tensor, ids: Tensor, expert: int) -> Tensor:
    """The rows of ``x [S, K]`` that ask for an expert, in their order; differentiable."""
    return x[ids == expert]


def _by_token(found: list[Tensor], ids: Tensor) -> Tensor:
    """What the experts made of their rows, ``E`` tensors ``[.., N]``, back in the order of the rows; differentiable."""
    sources = torch.argsort(ids, stable=True)
    return torch.cat(found)[torch.argsort(sources)]


_LIBRARY.impl("tokens_of", _tokens_of, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("by_token", _by_token, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
TOKENS_OF = torch.ops.sparsify.tokens_of.default
BY_TOKEN = torch.ops.sparsify.by_token.default


@dataclass(frozen=True)
class Stack:
    """The experts that one op stands for.

    Attributes:
        node: where their results come together.
        x: what they read, ``[S, K]``.
        ids: which of them each row asks for, ``[S]``.
        linears: the linear of each.
    """

    node: Node
    x: Node
    ids: Node
    linears: tuple[Node, ...]


def find_stacks(graph: Graph) -> list[Stack]:
    """Every stack of experts of a canonical graph, in execution order."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is BY_TOKEN:
            linears: Any = node.args[0]
            x, ids, _ = linears[0].args[0].args
            found.append(Stack(node, x, ids, tuple(linears)))
    return found


def split_experts(program: ExportedProgram, names: Mapping[str, str]) -> dict[str, Turned]:
    """Write every product with a stack of matrices as one linear for each of them, in place.

    Before:  y = stacked_linear(x, ids, W, b)       W [E, N, K], or [E, K, N]
             y = bmm(x, W)                          x [E, T, K], W [E, K, N] a parameter: every expert reads tokens of
                                                    its own, those that are not routed to it as zeros (Llama 4)
    After:   xe = tokens_of(x, ids, e);  ye = linear(xe, We, be) for every e;  y = by_token([y0, ...], ids)
             We [N, K], under W's name and the number of the expert. For ``bmm`` x is first turned into rows, all
             experts of the first token in front, as all others have them.
    Left alone: products with stacks that are no parameters.
    Numerics: the same products.

    Args:
        program: a traced program.
        names: placeholder name to parameter key.

    Returns:
        How the matrices of stacks now lie where they are transposed, by the key of the stack.

    Raises:
        InputError: a stack is read by something else too.
    """
    graph, state = program.graph_module.graph, program.state_dict
    pieces: dict[Node, list[Node]] = {}
    turned: dict[str, Turned] = {}
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        if node.target is aten.bmm.default and _is_stack(node.args[1], names, state):
            node = _as_rows(program, node)
        if node.target is not torch.ops.sparsify.stacked_linear.default:
            continue
        stack, bias, transposed = node.args[2:]
        for holder in [stack, *([] if bias is None else [bias])]:
            if names.get(holder.name) not in state or len(holder.users) != 1:
                raise InputError(f"{names.get(holder.name, holder.name)} is read by more than one product of experts")
        pieces[stack] = _split(program, stack, names[stack.name], transposed)
        if transposed:
            turned[names[stack.name]] = Turned((1,), (0,), tuple(stack.meta["val"].shape[1:]))
        if bias is not None:
            pieces[bias] = _split(program, bias, names[bias.name], False)
        _as_linears(program, node, pieces[stack], None if bias is None else pieces[bias], names[stack.name])
    if pieces:
        specs = []
        for spec in program.graph_signature.input_specs:
            specs.append(spec)
            own = next((found for holder, found in pieces.items() if holder.name == spec.arg.name), [])
            specs += [
                InputSpec(InputKind.PARAMETER, TensorArgument(its.name), f"{spec.target}.{e}")
                for e, its in enumerate(own)
            ]
        program.graph_signature.input_specs[:] = specs
        drop_unused(program)
    return turned


def _is_stack(value: Any, names: Mapping[str, str], state: Mapping[str, Tensor]) -> bool:
    return isinstance(value, Node) and value.op == "placeholder" and names.get(value.name) in state


def _as_rows(program: ExportedProgram, node: Node) -> Node:
    """``bmm`` as ``stacked_linear``; see ``split_experts``."""
    graph = program.graph_module.graph
    x, stack = node.args
    assert isinstance(x, Node)
    assert isinstance(stack, Node)
    val, (experts, inner, outer) = x.meta["val"], stack.meta["val"].shape

    def call(target: Any, *args: Any, val: Any) -> Node:
        made: Node = graph.call_function(target, args)
        made.meta = {**node.meta, "val": val}
        return made

    with graph.inserting_before(node):
        tokens = call(aten.sym_size.int, x, 1, val=val.shape[1])
        by_token = call(aten.transpose.int, x, 0, 1, val=val.transpose(0, 1))
        rows = call(aten.reshape.default, by_token, [-1, inner], val=val.transpose(0, 1).reshape(-1, inner))
        # Of the same device and shape as the graph has them: 0 .. E-1 for every token.
        number = call(aten.arange.default, experts, val=val.new_empty(experts, dtype=torch.int64))
        spread = call(aten.expand.default, number, [tokens, -1], val=number.meta["val"].expand(val.shape[1], -1))
        ids = call(aten.reshape.default, spread, [-1], val=spread.meta["val"].reshape(-1))
        flat = rows.meta["val"].new_empty(rows.meta["val"].shape[0], outer)
        product = call(torch.ops.sparsify.stacked_linear.default, rows, ids, stack, None, True, val=flat)
        back = call(aten.reshape.default, product, [-1, experts, outer], val=flat.reshape(-1, experts, outer))
        turned = call(aten.transpose.int, back, 0, 1, val=back.meta["val"].transpose(0, 1))
        result = call(aten.contiguous.default, turned, val=turned.meta["val"].contiguous())  # as bmm's is, for views
    replace_node(program, node, result)
    return product


def _split(program: ExportedProgram, holder: Node, key: str, transposed: bool) -> list[Node]:
    """Placeholders for the parts of a parameter along its first axis, behind it; their values are in the state dict."""
    stack, val = program.state_dict[key].detach(), holder.meta["val"]
    made: list[Node] = []
    for expert, part in enumerate(stack):
        own = mapped(part.t()) if transposed else part
        program.state_dict[f"{key}.{expert}"] = torch.nn.Parameter(own, requires_grad=False)
        with program.graph_module.graph.inserting_after(made[-1] if made else holder):
            made.append(program.graph_module.graph.placeholder(f"{holder.name}_{expert}"))
        made[-1].meta["val"] = val[expert].t().contiguous() if transposed else val[expert]
    return made


def _as_linears(program: ExportedProgram, node: Node, weights: list[Node], biases: list[Node] | None, key: str) -> None:
    graph = program.graph_module.graph
    x, ids = node.args[:2]
    assert isinstance(x, Node)
    found = []
    with graph.inserting_before(node):
        for expert, weight in enumerate(weights):
            path = f"{key}.{expert}"
            own = {**node.meta.get("nn_module_stack", {}), path: (path, "Expert")}
            rows = graph.call_function(TOKENS_OF, (x, ids, expert))
            rows.meta = {**node.meta, "val": x.meta["val"]}  # as if it were all of them: how many it is is in no size
            bias = () if biases is None else (biases[expert],)
            found.append(graph.call_function(aten.linear.default, (rows, weight, *bias)))
            found[-1].meta = {**node.meta, "nn_module_stack": own}
        joined = graph.call_function(BY_TOKEN, (found, ids))
    joined.meta = dict(node.meta)
    replace_node(program, node, joined)


def join_experts(
    program: ExportedProgram,
    stack: Stack,
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    op: Any,
    attributes: Iterable[int],
) -> None:
    """Let one op stand for a stack of experts, in place; what nothing reads then is for ``drop_unused``.

    Args:
        program: a canonical program.
        stack: the experts.
        names: placeholder name to parameter key.
        tensors: their weights as the op stores them, by input name.
        op: of torch.
        attributes: behind the bias, in the order of the op's arguments.
    """
    weights = [linear.args[1] for linear in stack.linears]
    biases = [linear.args[2] if len(linear.args) > 2 else None for linear in stack.linears]
    first = weights[0]
    assert isinstance(first, Node)
    key = names[first.name].rpartition(".")[0]
    held = [place_beside(program, first, f"{key}.{name}", tensor) for name, tensor in tensors.items()]
    rows = [program.state_dict[names[bias.name]] for bias in biases if isinstance(bias, Node)]
    bias = torch.cat(rows).detach() if rows else torch.zeros(len(weights) * int(first.meta["val"].shape[0]))
    held.append(place_beside(program, first, f"{key}.bias", bias))
    graph = program.graph_module.graph
    with graph.inserting_before(stack.node):
        new = graph.call_function(op, (stack.x, stack.ids, *held, *attributes))
    own = {**stack.node.meta.get("nn_module_stack", {}), key: (key, "Experts")}
    new.meta = {**stack.node.meta, "nn_module_stack": own}
    replace_node(program, stack.node, new)
    for linear in stack.linears:
        rows_node = linear.args[0]
        graph.erase_node(linear)
        graph.erase_node(rows_node)


def join_dense(program: ExportedProgram, names: Mapping[str, str]) -> None:
    """Let the op ``experts`` stand for every stack that is still one linear for each expert, in place.

    Before:  ye = linear(tokens_of(x, ids, e), We, be) for every e;  y = by_token([y0, ...], ids)
    After:   y = sparsify.experts(x, ids, W, b)             W [E, N, K]
    Left alone: everything else.
    Numerics: the same products.
    """
    stacks = find_stacks(program.graph_module.graph)
    for stack in stacks:
        state = program.state_dict
        weights = [state[names[str(linear.args[1])]].detach() for linear in stack.linears]
        tall = mapped(torch.stack(weights))
        del weights
        join_experts(program, stack, names, {"weight": tall}, getattr(torch.ops.sparsify, DENSE).default, ())
        drop_unused(program)
    if stacks:
        program.graph_module.recompile()


def by_expert(space: ChannelSpace) -> list[ChannelSpace]:
    """The channels of a stack of experts as one space for each of them; any other space as it is.

    In the graph they are one: what is between two products of a stack has the rows of all experts, and a channel of it
    is the same channel of each. But it is done row by row, and a row is one expert's on both sides, so every expert may
    have an order of its own. That is checked as all folds are, by running the block.
    """
    owners: dict[str, list[tuple[ChannelRange, bool]]] = {}
    for ranges, produces in ((space.producers, True), (space.consumers, False)):
        for its in ranges:
            owners.setdefault(its.param.rpartition(".")[2], []).append((its, produces))
    counts = {len(found) for found in owners.values()}
    if len(owners) < 2 or not all(number.isdecimal() for number in owners) or len(counts) != 1:
        return [space]
    return [
        ChannelSpace(
            space.size,
            tuple(its for its, produces in found if produces),
            tuple(its for its, produces in found if not produces),
        )
        for found in owners.values()
    ]


def restacked(name: str, shape: torch.Size, params: Mapping[str, Tensor], transposed: bool) -> Tensor | None:
    """A published parameter whose experts are parameters of their own in the program, put together again.

    Args:
        name: of the published parameter.
        shape: of the published parameter.
        params: weights by their key in the canonical program.
        transposed: whether its matrices are transposed there.

    Returns:
        Its value; None where it is one parameter there as well.
    """
    if len(shape) == 0 or f"{PREFIX}{name}.0" not in params:
        return None
    parts = [params[f"{PREFIX}{name}.{expert}"].detach() for expert in range(shape[0])]
    assert math.prod(parts[0].shape) == math.prod(shape[1:])
    return torch.stack([part.t() if transposed else part for part in parts])
