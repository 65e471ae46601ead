"""Finding the linears of a graph."""

import torch
from sparsify_export.passes.fx.canonical import parameter_names
from sparsify_export.passes.fx.linears import Linear, find_linears, module_path, module_paths
from torch import nn
from toys import export, stack

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def test_every_linear_in_execution_order():
    program = export(stack(layers=1), X)
    up = Linear("layers.0.up", "linear_1", "linear", "model.layers.0.up.weight", "model.layers.0.up.bias", 16, 8)
    found = find_linears(program.graph, parameter_names(program))
    assert [linear.path for linear in found] == ["first", "layers.0.up", "layers.0.down", "last"]
    assert found[1] == up
    assert found[2].bias is None
    assert (found[2].input, found[2].out_features, found[2].in_features) == ("relu", 8, 16)


class Odd(nn.Module):
    """Linears whose weight or bias is computed, or given as an input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(x, self.inner.weight.relu())
        x = nn.functional.linear(x, self.inner.weight, self.inner.bias * 2)
        return nn.functional.linear(x, given)


def test_weights_and_biases_that_are_no_parameters_are_not_found():
    program = export(Odd().requires_grad_(False), X, torch.randn(3, 8))
    assert find_linears(program.graph, parameter_names(program)) == []


def test_paths_start_behind_the_tracing_wrapper():
    program = export(stack(layers=1), X)
    nodes = {node.name: node for node in program.graph.nodes}
    assert module_path(nodes["relu"]) == "layers.0"
    assert module_paths(nodes["linear_1"])[-2:] == ["layers.0", "layers.0.up"]
    assert module_path(nodes["inputs_0"]) == ""
