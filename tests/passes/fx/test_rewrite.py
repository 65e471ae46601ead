"""Which linears become sparse ops, why the others do not, and that the program still runs."""

import pytest
import torch
from sparsify_export.calibrate.masks import nm_keep_mask
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect.storage import Storage, quantise_tokens
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.fx.rewrite import lower_linears, stored_weights
from torch import nn
from toys import export, stack

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def half(weight: torch.Tensor, n: int = 2, m: int = 4) -> None:
    weight.mul_(nm_keep_mask(weight.abs(), NM(n, m)))


def scattered(weight: torch.Tensor, sparsity: float) -> None:
    """Zeros anywhere, one group of four full."""
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) >= sparsity
    keep[0] = True
    weight.mul_(keep)


class One(nn.Module):
    """One linear with the given weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.only = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.only.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only(x)


def lower_one(weight: torch.Tensor, **options):
    program = export(One(weight), torch.randn(2, weight.shape[1]))
    (entry,) = lower_linears(program, **options)
    return entry, program


def test_each_weight_gets_the_op_of_its_pattern_and_the_rest_stays():
    model = stack()
    half(model.layers[0].up.weight)
    half(model.layers[1].down.weight, 1, 4)
    scattered(model.layers[1].up.weight, 0.7)
    half(model.last.weight)
    program = export(model, X)
    found = {entry.linear.path: (entry.op, entry.pattern, entry.reason) for entry in lower_linears(program)}
    sparsity = (model.layers[1].up.weight == 0).float().mean().item()
    assert found == {
        "first": ("MatMul", None, "the weight is dense"),
        "layers.0.up": ("linear_nm", "2:4", ""),
        "layers.0.down": ("MatMul", None, "the weight is dense"),
        "layers.1.up": ("linear_bitmask", f"{sparsity:g}", ""),
        "layers.1.down": ("linear_nm", "1:4", ""),
        "last": ("linear_nm", "2:4", ""),
    }
    program.validate()  # the signature names every placeholder and every result
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count("aten.linear.default") == 2
    assert targets.count("sparsify.linear_nm.default") == 3
    got = program.module(check_guards=False)(X)
    close = compare(got, model(X), model.double()(X.double()), factor=4.0)
    assert close.ok, close


def test_packed_weights_replace_the_dense_ones():
    model = stack(layers=1)
    half(model.layers[0].up.weight)
    program = export(model, X)
    lower_linears(program)
    specs = {spec.target: spec.arg.name for spec in program.graph_signature.input_specs if spec.target}
    assert specs.keys() == program.state_dict.keys()
    assert "model.layers.0.up.weight" not in program.state_dict
    assert program.state_dict["model.layers.0.up.weight.values"].shape == (16, 4)
    assert program.state_dict["model.layers.0.up.weight.indices"].dtype == torch.uint8
    placeholders = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    assert placeholders == [spec.arg.name for spec in program.graph_signature.input_specs]
    (node,) = [n for n in program.graph.nodes if "linear_nm" in str(n.target)]
    assert next(reversed(node.meta["nn_module_stack"].values()))[0] == "model.layers.0.up"


def test_a_parameter_that_nothing_reads_is_dropped():
    model = stack()
    model.layers[1].up = model.layers[0].up  # traced as two parameters, one of them unread
    program = export(model, X)
    assert "model.layers.0.up.weight" in program.state_dict
    lower_linears(program)
    assert "model.layers.0.up.weight" not in program.state_dict
    assert torch.equal(program.module(check_guards=False)(X), model(X))


def test_a_weight_of_two_linears_is_packed_for_both():
    model = stack()
    half(model.layers[0].up.weight)
    model.layers[1].up = model.layers[0].up
    program = export(model, X)
    assert [entry.op for entry in lower_linears(program)].count("linear_nm") == 2
    program.validate()
    keys = [key for key in program.state_dict if key.endswith("values")]
    assert len(keys) == 1  # stored once
    close = compare(program.module(check_guards=False)(X), model(X), model.double()(X.double()), factor=4.0)
    assert close.ok, close


def test_standard_ops_only_report():
    weight = torch.randn(4, 8)
    half(weight)
    entry, program = lower_one(weight, sparse=False)
    assert (entry.op, entry.pattern, entry.reason) == ("MatMul", "2:4", "--ops standard")
    assert entry.stored_bytes == entry.dense_bytes == 4 * 8 * 4
    assert torch.equal(program.state_dict["model.only.weight"], weight)


class Tied(nn.Module):
    """An embedding whose table is the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        half(self.table.weight.data)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


def test_a_tied_weight_stays_dense_and_says_why():
    program = export(Tied().requires_grad_(False), torch.zeros(2, 3, dtype=torch.long))
    (entry,) = lower_linears(program)
    assert (entry.op, entry.pattern) == ("MatMul", "2:4")
    assert entry.reason == "the weight is tied to something that is not a linear"


@pytest.mark.parametrize(
    ("sparsity", "wanted"),
    [(0.0, "the weight is dense"), (0.2, "the weight is dense"), (1.0, "the weight is zero everywhere")],
)
def test_too_few_zeros_and_nothing_but_zeros_are_left_dense(sparsity, wanted):
    weight = torch.randn(32, 40, generator=torch.Generator().manual_seed(3))
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < sparsity] = 0
    entry, _ = lower_one(weight)
    assert (entry.op, entry.pattern, entry.reason) == ("MatMul", None, wanted)


def test_15_of_16_would_not_be_smaller():
    weight = torch.randn(4, 16)
    weight[:, 5] = 0
    # 60 values of 4 bytes, and 8 bytes a row for 15 indices of 4 bits
    entry, program = lower_one(weight)
    assert (entry.op, entry.pattern) == ("MatMul", "15:16")
    assert entry.reason == f"packed it would take {60 * 4 + 4 * 8} bytes, dense {64 * 4}"
    assert "model.only.weight" in program.state_dict


def test_7_of_8_is_smaller_by_a_hair():
    weight = torch.randn(4, 16)
    weight[:, [1, 9]] = 0
    entry, _ = lower_one(weight)
    assert (entry.op, entry.pattern) == ("linear_nm", "7:8")
    assert entry.stored_bytes == 56 * 4 + 28 < entry.dense_bytes == 64 * 4


def test_a_narrow_matrix_pays_for_its_row_starts():
    weight = torch.randn(4, 5)
    weight[:, [0, 3]] = 0
    # 12 values, 4 bytes of mask, 5 row starts
    entry, _ = lower_one(weight)
    assert entry.reason == f"packed it would take {12 * 4 + 4 + 5 * 8} bytes, dense {20 * 4}"


@pytest.mark.parametrize(("kind", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_values_are_rounded_once_to_the_storage_dtype(kind, dtype):
    weight = torch.randn(4, 8)
    half(weight)
    entry, program = lower_one(weight, storage=Storage(kind))
    assert program.state_dict["model.only.weight.values"].dtype == dtype
    assert entry.stored_bytes == 16 * 2 + 4
    x = torch.randn(3, 8)
    got = program.module(check_guards=False)(x)
    stored = weight.to(dtype)
    plain = Storage(kind).activations(x) @ stored.float().T
    close = compare(got, plain, x.double() @ stored.double().T)
    assert close.ok, close


@pytest.mark.parametrize("storage", [Storage("int8"), Storage("int4", 64)], ids=str)
@pytest.mark.parametrize("pattern", ["nm", "bitmask"])
def test_integers_are_stored_with_scales_and_unpack_to_what_the_op_computes(storage, pattern):
    weight = torch.randn(16, 72, generator=torch.Generator().manual_seed(5))
    if pattern == "nm":
        half(weight)
    else:
        scattered(weight, 0.6)
    entry, program = lower_one(weight, storage=storage)
    assert entry.op == f"linear_{pattern}_{storage.kind}"
    (stored,) = stored_weights(program, [entry]).values()
    assert entry.stored_bytes == stored.nbytes < entry.dense_bytes / 2
    x = torch.randn(3, 72, generator=torch.Generator().manual_seed(6))
    got = program.module(check_guards=False)(x)
    plain, exact = (nn.functional.linear(quantise_tokens(a), stored.unpack().to(a.dtype)) for a in (x, x.double()))
    close = compare(got, plain, exact, factor=4.0)
    assert close.ok, close


@pytest.mark.parametrize(
    ("storage", "why"),
    [
        (
            Storage("int8"),
            "only: a weight in row 2 is infinite or NaN and cannot be quantised; store",
        ),
        (Storage("int4", 32), "only: a weight in row 2 is infinite or NaN"),
    ],
    ids=str,
)
def test_a_weight_that_cannot_be_quantised_is_refused_by_name(storage, why):
    weight = torch.randn(4, 32)
    half(weight)
    weight[2, weight[2].nonzero()[0]] = torch.inf
    with pytest.raises(InputError, match=why):
        lower_one(weight, storage=storage)


def test_a_weight_too_large_for_fp16_is_refused_by_name():
    weight = torch.randn(4, 8)
    half(weight)
    weight[2, weight[2].nonzero()[0]] = 1e6
    with pytest.raises(InputError, match=r"only: 1e\+06 does not fit float16, .*; store the weights as fp32 or bf16"):
        lower_one(weight, storage=Storage("fp16"))


def test_a_weight_that_is_not_worth_it_stays_dense_and_says_why():
    weight = torch.randn(4, 8)
    half(weight)
    asked = []
    entry, program = lower_one(weight, worth=lambda *what: asked.append(what) or "too slow")
    assert (entry.op, entry.pattern, entry.reason) == ("MatMul", "2:4", "too slow")
    assert entry.stored_bytes == entry.dense_bytes
    assert torch.equal(program.state_dict["model.only.weight"], weight)
    assert asked == [(NM(2, 4), 4, 8, 16)]
    assert lower_one(weight, worth=lambda *what: "")[0].op == "linear_nm"


def test_only_weights_that_could_be_lowered_are_asked_about():
    def never(*what):
        raise AssertionError(what)

    assert lower_one(torch.randn(4, 8), worth=never)[0].reason == "the weight is dense"
    weight = torch.randn(4, 16)
    weight[:, 5] = 0
    assert lower_one(weight, worth=never)[0].pattern == "15:16"


class Fixed(nn.Module):
    """A linear whose weight is no parameter and not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(4, 8)
        half(weight)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


def test_a_constant_is_left_alone_and_says_why():
    model = Fixed()
    program = export(model, X)
    (entry,) = lower_linears(program)
    assert (entry.op, entry.reason) == ("MatMul", "the weight is a constant, not a parameter")
    assert torch.equal(program.module(check_guards=False)(X), model(X))
