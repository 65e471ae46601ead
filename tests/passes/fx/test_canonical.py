"""One form for every graph: what is removed, what is rewritten, and what is left alone."""

import pytest
import torch
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.fx.canonical import canonicalise, parameter_names
from torch import Tensor, nn
from toys import export

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
aten = torch.ops.aten


class Function(nn.Module):
    """A function with a weight [8, 8], a bias [8] and an unused weight."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(8), requires_grad=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def canonical(function, x: Tensor = X):
    """The targets after the pass, and the program; checks that it is valid and computes the same."""
    model = Function(function)
    program = export(model, x, canonical=False)
    canonicalise(program)
    program.validate()
    got, baseline = program.module(check_guards=False)(x), model(x)
    assert got.dtype == baseline.dtype
    if not torch.equal(got, baseline):
        close = compare(got, baseline, model.double()(x.double()), factor=4.0)
        assert close.ok, close
    return [node.target for node in program.graph.nodes if node.op == "call_function"], program


def conv1d(model: Function, x: Tensor) -> Tensor:
    """GPT-2's linear, as transformers writes it."""
    return torch.addmm(model.bias, x.view(-1, 8), model.weight).view(x.shape)


def test_what_does_nothing_is_removed():
    def identities(model, x):
        x = x[:].relu()[:, 0:]
        x = nn.functional.dropout(x.to(torch.float32), 0.5, training=False)
        return x.type_as(model.weight).float().sigmoid()

    assert canonical(identities)[0] == [aten.relu.default, aten.sigmoid.default]


def test_an_identity_may_be_the_result():
    targets, program = canonical(lambda model, x: x.relu().float())
    assert targets == [aten.relu.default]
    assert program.graph_signature.user_outputs == ("relu",)


def test_slices_and_casts_that_do_something_stay():
    assert canonical(lambda model, x: x[:, 1:])[0] == [aten.slice.Tensor]
    assert canonical(lambda model, x: x[:, :3])[0] == [aten.slice.Tensor]
    assert canonical(lambda model, x: x[:, ::2])[0] == [aten.slice.Tensor]
    assert len(canonical(lambda model, x: x.double().float())[0]) == 2


def test_a_reshape_to_its_own_shape_goes_and_any_other_stays():
    assert canonical(lambda model, x: x.relu().reshape(x.shape[0], -1, 8))[0] == [aten.relu.default]
    assert canonical(lambda model, x: x.relu().view(x.shape))[0] == [aten.relu.default]
    assert len(canonical(lambda model, x: x.relu().reshape(-1, 8))[0]) == 2
    assert len(canonical(lambda model, x: x.relu().reshape(x.shape[0], 8, 5))[0]) > 1
    assert len(canonical(lambda model, x: x.relu().reshape(x.shape[0], 5, 8, 1))[0]) > 1


def test_a_product_with_one_goes_only_where_the_type_stays():
    assert canonical(lambda model, x: (x * 1.0).relu())[0] == [aten.relu.default]
    assert canonical(lambda model, x: (x * 2.0).relu())[0] == [aten.mul.Tensor, aten.relu.default]
    ids = torch.arange(6).reshape(2, 3)
    assert canonical(lambda model, x: x * 1.0, ids)[0] == [aten.mul.Tensor]  # integers become floats


def test_addmm_becomes_linear_with_its_weight_transposed():
    targets, program = canonical(conv1d)
    assert aten.addmm.default not in targets
    (linear,) = [n for n in program.graph.nodes if n.target is aten.linear.default]
    _, weight, bias = linear.args
    assert parameter_names(program)[weight.name] == "model.weight"
    assert parameter_names(program)[bias.name] == "model.bias"
    stored = program.state_dict["model.weight"]
    assert torch.equal(stored, Function(conv1d).weight.T)
    assert stored.is_contiguous()
    assert next(reversed(linear.meta["nn_module_stack"].values()))[0] == "model"


def test_addmm_may_be_the_result():
    targets, program = canonical(lambda model, x: torch.addmm(model.bias, x, model.weight), X[0])
    assert targets == [aten.linear.default]
    assert program.graph_signature.user_outputs == (program.graph.output_node().args[0][0].name,)


def test_addmm_without_a_weight_of_its_own_is_left_alone():
    def computed(model, x):
        return torch.addmm(model.bias, x, model.weight.relu())

    def shared(model, x):
        return torch.addmm(model.bias, x, model.weight) + model.weight.sum()

    def scaled(model, x):
        return torch.addmm(model.bias, x, model.weight, alpha=2.0)

    for function in (computed, shared, scaled):
        targets, program = canonical(function, X[0])
        assert aten.addmm.default in targets
        assert aten.linear.default not in targets
        assert torch.equal(program.state_dict["model.weight"], Function(function).weight)


def test_a_second_run_changes_nothing():
    _, program = canonical(conv1d)
    before, weight = str(program.graph), program.state_dict["model.weight"]
    canonicalise(program)
    assert str(program.graph) == before
    assert program.state_dict["model.weight"] is weight


def test_a_product_with_a_transposed_weight_becomes_linear():
    turns = (
        lambda model: model.weight.T,
        lambda model: model.weight.t(),
        lambda model: model.weight.transpose(0, 1),
        lambda model: model.weight.permute(1, 0),
    )
    for turn in turns:
        targets, program = canonical(lambda model, x, turn=turn: x @ turn(model))
        assert aten.linear.default in targets
        assert aten.matmul.default not in targets
        assert torch.equal(program.state_dict["model.weight"], Function(None).weight)


def test_the_only_head_of_keys_and_values_is_repeated_for_attention():
    def attention(model, x):
        heads = x.unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(heads.expand(-1, 4, -1, -1), heads, heads)

    _, program = canonical(attention)
    (node,) = [n for n in program.graph.nodes if n.target is aten.scaled_dot_product_attention.default]
    assert [argument.meta["val"].shape[1] for argument in node.args[:3]] == [4, 4, 4]


@pytest.mark.parametrize(("places", "sliced"), [([-2], True), ([1, 2], True), ([0, 2], False), ([2, 1], False)])
def test_constants_one_after_the_other_are_a_slice(places, sliced):
    targets, _ = canonical(lambda model, x: x[:, places].relu())
    assert (aten.slice.Tensor in targets) == sliced
    assert (aten.index.Tensor in targets) == (not sliced)


def test_what_two_lists_or_a_mask_take_is_no_slice():
    targets, _ = canonical(lambda model, x: x[[0, 1], [2, 3]].relu())
    assert aten.index.Tensor in targets
    targets, _ = canonical(lambda model, x: x[:, torch.tensor([True, False, True, True, False])].relu())
    assert aten.slice.Tensor not in targets
