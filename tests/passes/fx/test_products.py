"""Products that are no ``nn.Linear``: which become linears, what they compute, and how the weight goes back."""

import pytest
import torch
from sparsify_export.passes.fx.canonical import canonicalise, parameter_names
from torch import nn
from toys import export

aten = torch.ops.aten
X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3))


class Product(nn.Module):
    def __init__(self, function, *shape):
        super().__init__()
        torch.manual_seed(1)
        self.function, self.weight, self.bias = function, nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.function(self, x)


def einsum(equation):
    return lambda model, x: torch.einsum(equation, x, model.weight)


CASES = {
    "matmul": (lambda model, x: x @ model.weight, (6, 8)),
    "conv1d": (lambda model, x: nn.functional.conv1d(x.transpose(1, 2), model.weight, model.bias), (8, 6, 1)),
    "conv1d without a bias": (lambda model, x: nn.functional.conv1d(x.transpose(1, 2), model.weight), (8, 6, 1)),
    "heads out of one axis": (einsum("ibh,hnd->ibnd"), (6, 4, 2)),
    "the weight in front": (lambda model, x: torch.einsum("hnd,ibh->bnid", model.weight, x), (6, 4, 2)),
    "heads into one axis": (lambda model, x: einsum("ibnd,hnd->ibh")(model, x.unflatten(-1, (3, 2))), (8, 3, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_product_is_a_linear_that_computes_the_same_and_its_weight_goes_back(name):
    function, shape = CASES[name]
    model = Product(function, *shape).eval()
    program = export(model, X, canonical=False)
    turned = canonicalise(program)
    (linear,) = [n for n in program.graph.nodes if n.target is aten.linear.default]
    assert parameter_names(program)[linear.args[1].name] == "model.weight"
    stored = program.state_dict["model.weight"]
    assert list(stored.shape) == [8, 6]
    assert stored.is_contiguous()
    assert torch.equal(turned["model.weight"].original(stored), model.weight)
    torch.testing.assert_close(program.module()(X), model(X))
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta


LEFT = {
    "two places": (lambda model, x: nn.functional.conv1d(x.transpose(1, 2), model.weight, model.bias), (8, 6, 2)),
    "groups": (lambda model, x: nn.functional.conv1d(x.transpose(1, 2), model.weight, groups=2), (8, 3, 1)),
    "a stride": (lambda model, x: nn.functional.conv1d(x.transpose(1, 2), model.weight, stride=2), (8, 6, 1)),
    "padding": (lambda model, x: nn.functional.conv1d(x.transpose(1, 2), model.weight, padding=1), (8, 6, 1)),
    "an axis of both in the result": (einsum("ibh,bhd->ibd"), (5, 6, 8)),
    "read twice": (lambda model, x: x @ model.weight + model.weight.sum(), (6, 8)),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    function, shape = LEFT[name]
    model = Product(function, *shape).eval()
    program = export(model, X, canonical=False)
    assert canonicalise(program) == {}
    assert all(node.target is not aten.linear.default for node in program.graph.nodes)
    assert torch.equal(program.state_dict["model.weight"], model.weight)


def test_a_weight_that_lies_as_a_linear_has_it_stays_as_it_is():
    model = Product(lambda model, x: x @ model.weight.T, 8, 6).eval()
    program = export(model, X, canonical=False)
    assert canonicalise(program) == {}
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [aten.linear.default]
    assert torch.equal(program.state_dict["model.weight"], model.weight)
