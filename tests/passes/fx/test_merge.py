"""Which linears become one op, which do not, and that every row stays what it was."""

import pytest
import torch
from sparsify_export.calibrate.masks import nm_keep_mask
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect.storage import FP32, Storage
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.fx.merge import merge_linears
from sparsify_export.passes.fx.rewrite import lower_linears
from torch import nn
from toys import export

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


class Attentive(nn.Module):
    """Three linears of one input, and one of what they give."""

    def __init__(self, *, bias: tuple[bool, bool, bool] = (True, True, True)) -> None:
        super().__init__()
        torch.manual_seed(20261122)
        self.q, self.k, self.v = (nn.Linear(8, rows, bias=b) for rows, b in zip((6, 3, 5), bias, strict=True))
        self.o = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = self.q(x)
        return self.o(q), self.k(x), self.v(x)


def half(weight: torch.Tensor, n: int = 2, m: int = 4) -> None:
    weight.data.mul_(nm_keep_mask(weight.data.abs(), NM(n, m)))


def scattered(weight: torch.Tensor, every: int) -> None:
    """Zeros that no N:M pattern fits: one row is full."""
    keep = torch.arange(weight.numel()).reshape(weight.shape) % every == 0
    keep[0] = True
    weight.data.mul_(keep)


def merged(model: nn.Module, *, storage: Storage = FP32):
    """The program before and after, and how many ops each kind has afterwards."""
    model = model.eval().requires_grad_(False)
    program = export(model, X)
    lower_linears(program, storage=storage)
    before = program.module(check_guards=False)(X)
    merge_linears(program)
    program.validate()
    after = program.module(check_guards=False)(X)
    counts: dict[str, int] = {}
    for node in program.graph.nodes:
        if "linear" in str(node.target) and node.op == "call_function":
            name = str(node.target).split(".")[1]
            counts[name] = counts.get(name, 0) + 1
    return program, before, after, counts


def assert_close(model: nn.Module, before, after, x: torch.Tensor = X) -> None:
    exact = model.double()(x.double())
    for old, new, true in zip(before, after, exact, strict=True):
        close = compare(new, old, true, factor=4.0)
        assert close.ok, close


def assert_same_bits(before, after):
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_three_2_of_4_linears_become_one_with_the_same_bits(kind):
    model = Attentive()
    for linear in (model.q, model.k, model.v):
        half(linear.weight)
    program, before, after, counts = merged(model, storage=Storage(kind))
    op = "linear_nm_int8" if kind == "int8" else "linear_nm"
    assert counts == {op: 1, "linear": 1}
    assert_same_bits(before, after)
    assert program.state_dict["model.q+k+v.weight.values"].shape == (14, 4)
    assert program.state_dict["model.q+k+v.bias"].shape == (14,)
    assert not {"model.q.weight.values", "model.k.bias"} & program.state_dict.keys()
    specs = {spec.target for spec in program.graph_signature.input_specs if spec.target}
    assert specs == program.state_dict.keys()
    (node,) = [n for n in program.graph.nodes if op in str(n.target)]
    assert next(reversed(node.meta["nn_module_stack"].values()))[0] == "model.q+k+v"


def test_bitmask_weights_of_different_sparsity_merge():
    model = Attentive()
    for name, rows, every in (("q", 6, 2), ("k", 3, 3), ("v", 5, 5)):
        setattr(model, name, nn.Linear(64, rows))
        scattered(getattr(model, name).weight, every)
    model.eval().requires_grad_(False)
    x = torch.randn(2, 3, 64)
    program = export(model, x)
    lowered = {entry.linear.path: entry.op for entry in lower_linears(program)}
    assert {lowered[name] for name in "qkv"} == {"linear_bitmask"}
    before = program.module(check_guards=False)(x)
    merge_linears(program)
    program.validate()
    assert_close(model, before, program.module(check_guards=False)(x), x)
    assert [str(n.target) for n in program.graph.nodes].count("sparsify.linear_bitmask.default") == 1


def test_dense_linears_merge():
    model = Attentive()
    _, before, after, counts = merged(model)
    assert counts == {"linear": 2}
    assert_close(model, before, after)


def test_a_missing_bias_is_zero_and_none_stays_none():
    model = Attentive(bias=(True, False, True))
    program, before, after, counts = merged(model)
    assert counts == {"linear": 2}
    assert program.state_dict["model.q+v.bias"][6:9].count_nonzero() == 0
    assert_close(model, before, after)
    program, *_ = merged(Attentive(bias=(False, False, False)))
    assert not [key for key in program.state_dict if key.endswith("bias") and "o" not in key]


def test_one_2_of_4_among_dense_and_1_of_4_stays_alone():
    model = Attentive()
    half(model.q.weight)
    half(model.k.weight, 1, 4)
    _, before, after, counts = merged(model)
    assert counts == {"linear_nm": 2, "linear": 2}
    assert_same_bits(before, after)


class Tied(nn.Module):
    """The weight of ``a`` is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.a(x), self.a.weight) + self.b(x)


class SharedBias(nn.Module):
    """One bias for two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.bias = self.a.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.a.weight, self.a.bias) + nn.functional.linear(x, self.b.weight, self.a.bias)


class Fixed(nn.Module):
    """Weights that are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.randn(4, 8), persistent=False)
        self.register_buffer("b", torch.randn(4, 8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.a) + nn.functional.linear(x, self.b)


@pytest.mark.parametrize(("model", "linears"), [(Tied, 3), (SharedBias, 2), (Fixed, 2)])
def test_left_alone(model, linears):
    torch.manual_seed(1)
    _, before, after, counts = merged(model())
    assert counts == {"linear": linears}
    assert torch.equal(before, after)


def test_weights_apart_merge_with_each_other_only():
    program = export(Attentive().eval().requires_grad_(False), X)
    keys = {f"model.{name}.weight" for name in "qk"}
    assert merge_linears(program, apart=keys) == {"model.q+k.weight": ["model.q.weight", "model.k.weight"]}
    assert "model.v.weight" in program.state_dict


class Parallel(nn.Module):
    """Attention and MLP that read the same input, in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(20261126)
        self.self_attn, self.mlp = nn.ModuleDict({"q": nn.Linear(8, 4)}), nn.ModuleDict({"gate": nn.Linear(8, 6)})

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.self_attn["q"](x), self.mlp["gate"](x)


def test_linears_of_several_modules_are_named_in_full():
    program, *_ = merged(Parallel())
    (node,) = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
    path = next(reversed(node.meta["nn_module_stack"].values()))[0]
    assert path == "model.self_attn.q+mlp.gate"
