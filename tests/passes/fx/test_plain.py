"""Dense linears as plain matrix products."""

import torch
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.fx.plain import plain_linears
from torch import nn
from toys import export, stack

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
aten = torch.ops.aten


def targets(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def test_every_linear_becomes_a_product_and_its_bias_a_sum():
    model = stack(layers=1)
    program = export(model, X)
    plain_linears(program)
    program.validate()
    found = targets(program)
    assert aten.linear.default not in found
    assert found.count(aten.matmul.default) == 4
    assert found.count(aten.add.Tensor) == 3 + 1  # first, up and last have a bias; the residual
    stored = program.state_dict["model.last.weight"]
    assert torch.equal(stored, model.last.weight.T)
    assert stored.is_contiguous()
    (node,) = [n for n in program.graph.nodes if n.name == "p_model_last_weight"]
    assert node.meta["val"].shape == (8, 3)


def test_numerics_and_where_it_came_from():
    model = stack()
    program = export(model, X)
    plain_linears(program)
    close = compare(program.module(check_guards=False)(X), model(X), model.double()(X.double()), factor=4.0)
    assert close.ok, close
    (node, *_) = [n for n in program.graph.nodes if n.target is aten.matmul.default]
    assert next(reversed(node.meta["nn_module_stack"].values()))[0] == "model.first"
    assert node.meta["val"].shape[1:] == (5, 8)


def test_the_models_own_weights_are_not_touched():
    model = stack(layers=1)
    before = model.first.weight.clone()
    plain_linears(export(model, X))
    assert torch.equal(model.first.weight, before)


class Twice(nn.Module):
    """One linear, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x))


class Tied(nn.Module):
    """An embedding whose table is the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


def test_weights_that_are_read_twice_are_left_alone():
    for model, x in ((Twice(), X), (Tied(), torch.zeros(2, 3, dtype=torch.long))):
        program = export(model.requires_grad_(False), x)
        before = targets(program)
        plain_linears(program)
        assert targets(program) == before
        assert torch.equal(program.module(check_guards=False)(x), model(x))


class Fixed(nn.Module):
    """A linear whose weight is no parameter and not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(4, 8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


def test_a_constant_is_left_alone():
    model = Fixed()
    program = export(model, X)
    plain_linears(program)
    assert targets(program) == [aten.linear.default]
    assert torch.equal(program.module(check_guards=False)(X), model(X))
