"""Prologue, blocks and epilogue: what is in which part, and that the parts in order are the model."""

from unittest import mock

import pytest
import torch
from sparsify_export.calibrate import matmul
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.run import advance, run_part, start, walk
from torch import Tensor, nn
from toys import Block, Cached, Stack, export, stack, weights

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def run_all(program, *inputs):
    parts, params = partition(program), weights(program)
    values = start(parts, inputs)
    for part in parts.parts:
        values.update(run_part(part, values, params, parts.params))
    return [values[name] for name in parts.outputs]


def whole(model, *inputs):
    """The model itself, its linears by the product that parts are run with."""
    with mock.patch("torch.nn.functional.linear", matmul.linear):
        return model(*inputs)


def calls(part):
    return [str(n.target).split(".")[1] for n in part.module.graph.nodes if n.op == "call_function"]


def test_the_parts_of_a_small_model():
    parts = partition(export(stack(), X))
    assert [part.path for part in parts.parts] == ["", "layers.0", "layers.1", ""]
    assert [calls(part) for part in parts.parts] == [
        ["linear"],
        ["linear", "relu", "linear", "add"],
        ["linear", "relu", "linear", "add"],
        ["linear"],
    ]
    assert [[linear.path for linear in part.linears] for part in parts.parts] == [
        [],
        ["layers.0.up", "layers.0.down"],
        ["layers.1.up", "layers.1.down"],
        [],
    ]
    assert parts.inputs == ("inputs_0",)
    assert parts.blocks == parts.parts[1:3]
    assert parts.parts[1].inputs[0] == parts.parts[0].outputs[0]
    assert set(parts.parts[1].inputs[1:]) == {n for n in parts.params if "layers_0" in n}


@pytest.mark.parametrize("layers", [1, 2, 11])
def test_all_parts_in_order_equal_the_whole_bit_for_bit(layers):
    model = stack(layers)
    (got,) = run_all(export(model, X), X)
    assert torch.equal(got, whole(model, X))
    assert torch.equal(run_all(export(model, X), X[:1])[0], whole(model, X[:1]))


def test_ten_layers_come_in_execution_order():
    assert [part.path for part in partition(export(stack(11), X)).blocks] == [f"layers.{i}" for i in range(11)]


def test_shared_inputs_are_edges_and_results_of_blocks_are_outputs():
    torch.manual_seed(0)
    model = Cached().eval().requires_grad_(False)
    parts = partition(export(model, X))
    tables = set(parts.parts[0].outputs) & set(parts.parts[1].inputs) & set(parts.parts[2].inputs)
    assert len(tables) == 1
    assert parts.outputs[1] in parts.parts[1].outputs
    assert parts.outputs[0] in parts.parts[3].outputs
    got = run_all(export(model, X), X)
    assert all(torch.equal(a, b) for a, b in zip(got, whole(model, X), strict=True))


class TwoStacks(nn.Module):
    """Two stacks side by side, each with a projection after its layers; of one, only the layers' forward is called."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList([Block(8, 16) for _ in range(2)])
        self.right = nn.ModuleList([Block(8, 16) for _ in range(2)])
        self.left_out, self.right_out = nn.Linear(8, 4), nn.Linear(8, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = x.flip(1)
        for left in self.left:
            x = left(x)
        x = self.left_out(x)
        for right in self.right:
            y = right.forward(y)
        return self.head(x * self.right_out(y))


def test_every_stack_is_cut_into_its_layers_and_what_is_between_them_is_no_layer():
    torch.manual_seed(0)
    model = TwoStacks().eval().requires_grad_(False)
    parts = partition(export(model, X))
    assert [part.path for part in parts.parts] == ["", "left.0", "left.1", "", "right.0", "right.1", ""]
    assert [[linear.path for linear in part.linears] for part in parts.blocks] == [
        [f"{side}.{i}.up", f"{side}.{i}.down"] for side in ("left", "right") for i in range(2)
    ]
    (got,) = run_all(export(model, X), X)
    assert torch.equal(got, whole(model, X))
    seen = []
    values = start(parts, (X,))
    for part, kept in walk(parts, weights(export(model, X)), [values]):
        seen.append(part.path)
        advance(part, values, weights(export(model, X)), parts.params, kept)
    assert seen == ["left.0", "left.1", "right.0", "right.1"]


class BareEnds(nn.Module):
    """Nothing in front of the blocks and nothing behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([Block(8, 16) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.h:
            x = layer(x)
        return x


def test_prologue_and_epilogue_may_be_missing():
    model = BareEnds().requires_grad_(False)
    program = export(model, X)
    assert [part.path for part in partition(program).parts] == ["h.0", "h.1"]
    assert torch.equal(run_all(program, X)[0], whole(model, X))


class TwoLists(Stack):
    """A second, shorter list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[0](super().forward(x))


def test_the_list_with_most_linears_counts():
    assert [part.path for part in partition(export(TwoLists().requires_grad_(False), X)).blocks] == [
        "layers.0",
        "layers.1",
    ]


def test_a_model_without_repeated_layers_is_refused():
    with pytest.raises(InputError, match="no repeated layers with linear weights, so there is nothing to prune"):
        partition(export(nn.Linear(8, 8).requires_grad_(False), X))


class Experts(Block):
    """A block that also multiplies by a stack of matrices."""

    def __init__(self) -> None:
        super().__init__(8, 16)
        self.experts = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.einsum("btk,ekn->btn", x, self.experts)


def test_experts_are_refused_by_name():
    model = stack()
    model.layers[1] = Experts()
    with pytest.raises(InputError, match=r"^layers\.1\.experts \[4, 8, 8\] is a stack of expert matrices"):
        partition(export(model.requires_grad_(False), X))


class ConstantWeight(Block):
    """A linear whose weight cannot be replaced, because it is no parameter."""

    def __init__(self) -> None:
        super().__init__(8, 16)
        self.register_buffer("mix", torch.randn(8, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.linear(x, self.mix))


def test_constants_are_not_prunable():
    model = stack()
    model.layers[0] = ConstantWeight()
    program = export(model.requires_grad_(False), X)
    assert [linear.path for linear in partition(program).blocks[0].linears] == ["layers.0.up", "layers.0.down"]
    assert torch.equal(run_all(program, X)[0], whole(model, X))
