"""Every op and storage: packing against plain loops, functions and torch ops against the unpacked weight."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import QUANTISED, STORAGES, bare_session, pattern_weight, quantise, slow_pack, tokens
from sparsify_export import _native
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.dialect import packed as dialect
from sparsify_export.passes.dialect.packed import OPS, TENSORS, Packed, op_name, pack, packed_bytes
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.equivalence import compare

PATTERNS = [NM(1, 2), NM(2, 4), NM(3, 4), NM(3, 5), NM(5, 8), NM(4, 16), NM(3, 17), NM(20, 32), Unstructured(0.5)]


def equal(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return got.dtype == wanted.dtype and got.shape == wanted.shape and torch.equal(got, wanted)


def reference(x: torch.Tensor, stored: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """The op's own reference, called with what the node has."""
    attributes = dict(stored.attributes)
    if "n" in attributes:
        attributes["nm"] = NM(attributes.pop("n"), attributes.pop("m"))
    return OPS[stored.op].reference(x, *stored.tensors.values(), bias, **attributes)


def assert_equals_reference(got: torch.Tensor, x: torch.Tensor, stored: Packed, bias: torch.Tensor | None) -> None:
    """Within four times the error of the plain expression; of bfloat16 weights, on activations in bfloat16."""
    exact = reference(x.double(), stored, None if bias is None else bias.double())
    rounded = x.bfloat16().float() if stored.tensors["values"].dtype == torch.bfloat16 else x
    close = compare(got, reference(rounded, stored, bias), exact, factor=4.0)
    assert close.ok, close


@settings(max_examples=80, deadline=None)
@given(
    st.one_of(
        st.integers(2, 32).flatmap(lambda m: st.integers(1, m - 1).map(lambda n: NM(n, m))),
        st.sampled_from([0.01, 0.1, 0.5, 0.9]).map(Unstructured),
    ),
    st.integers(1, 4),
    st.integers(1, 200),
    st.integers(0, 99),
    st.sampled_from([1.0, 1e-30, 1e-43, 3e3]),
    st.sampled_from(STORAGES),
)
def test_packing_follows_the_layout_bit_for_bit(pattern, rows, columns, seed, size, storage):
    if isinstance(pattern, NM):
        columns = max(columns // pattern.m, 1) * pattern.m
    weight = pattern_weight(pattern, rows, columns, seed) * size
    stored, wanted = pack(weight, pattern, storage), slow_pack(weight, pattern, storage)
    assert stored.op == op_name(pattern, storage)
    assert tuple(stored.tensors) == TENSORS[stored.op]
    for name, tensor in stored.tensors.items():
        assert equal(tensor, wanted[name]), name
    room = packed_bytes(rows, columns, int(weight.count_nonzero()), pattern, storage)
    assert stored.nbytes <= room
    assert stored.nbytes == room or stored.op == "linear_bitmask_int4"


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_unpacking_gives_the_weight_as_it_was_rounded(pattern, storage):
    weight = pattern_weight(pattern, 5, 136 if isinstance(pattern, Unstructured) else 5 * pattern.m)
    if storage.quantised:
        codes, scales = quantise(weight, storage)
        each = scales[:, None] if storage.kind == "int8" else scales.float().repeat_interleave(storage.group, dim=1)
        wanted = codes.float() * each[:, : weight.shape[1]]
    else:
        wanted = weight.to(storage.dtype).float()
    assert equal(pack(weight, pattern, storage).unpack(), wanted)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_any_float_weight_is_taken_and_the_number_of_threads_does_not_matter(pattern, storage):
    weight = pattern_weight(pattern, 300, 516).half()
    before, results = _native.num_threads(), []
    try:
        for threads in (1, 3):
            _native.set_num_threads(threads)
            results.append(pack(torch.nn.Parameter(weight), pattern, storage).tensors)
    finally:
        _native.set_num_threads(before)
    for name, tensor in pack(weight.float().t().contiguous().t(), pattern, storage).tensors.items():
        assert equal(tensor, results[0][name])
        assert equal(tensor, results[1][name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_kind_of_number_is_rounded_as_torch_rounds(dtype):
    bits = torch.arange(0, 2**32, 2**32 // 400_009).to(torch.int64)
    weight = (bits - 2**31).to(torch.int32).view(torch.float32)
    weight = torch.where(weight.abs() < (65520 if dtype == torch.float16 else 3.39e38), weight, 1.0)
    weight = torch.cat([weight, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    weight = weight[weight != 0][None]
    kind = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    got = pack(weight, Unstructured(0.5), Storage(kind)).tensors["values"]
    wanted = weight[0].to(dtype)
    number = ~wanted.isnan()
    assert torch.equal(got.isnan(), ~number)
    assert torch.equal(got[number], wanted[number])
    assert not torch.signbit(got[got == 0]).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_floats_keep_what_is_not_finite_and_integers_refuse_it(bad):
    weight = torch.ones(3, 8)
    weight[1] = torch.tensor([0, bad, 0, 1, 0, 0, 1, 0])
    weight[[0, 2]] = torch.tensor([0, 1.0, 0, 1, 0, 0, 1, 0])
    for pattern in (NM(2, 4), Unstructured(0.5)):
        for storage in STORAGES:
            if storage.quantised:
                with pytest.raises(ValueError, match="a weight in row 1 is infinite or NaN and cannot be quantised"):
                    pack(weight, pattern, storage)
            else:
                assert torch.equal(pack(weight, pattern, storage).unpack().isfinite(), weight.isfinite())


def test_given_scales_are_used_and_stored():
    weight = torch.tensor([[8.0, 0, 0, 3.0], [0, -1.0, 0.2, 0]])
    for op, group in ((dialect.linear_nm_int8, ()), (dialect.linear_nm_int4, (32,))):
        scales = torch.tensor([2.0, 0.0]) if not group else torch.tensor([[2.0], [0.0]]).half()
        values, _, used = op.pack(weight, NM(2, 4), *group, scales)
        assert used is scales
        if group:
            assert values.tolist() == [[(4 + 8) | (2 + 8) << 4], [8 | 8 << 4]]
        else:
            assert values.tolist() == [[4, 2], [0, 0]]  # 3 / 2 = 1.5 is a tie and goes to the even 2
    for op, group in ((dialect.linear_bitmask_int8, ()), (dialect.linear_bitmask_int4, (32,))):
        scales = torch.tensor([0.01, 1.0]) if not group else torch.tensor([[0.01], [1.0]]).half()
        values, *_, used = op.pack(weight, *group, scales)
        assert used is scales
        most = 15 if group else 127
        assert values.tolist() == ([most | most << 4, 7 | 8 << 4] if group else [127, 127, -1, 0])


def test_scales_that_do_not_fit_are_refused():
    weight = torch.tensor([[1.0, 0, 0, 3.0]])
    for bad, why in [
        (torch.tensor([1.0, 2.0]), r"scales must have shape \[1\], got \[2\]"),
        (torch.tensor([torch.nan]), "scales must be finite, got an infinity or NaN in row 0"),
        (torch.tensor([1.0]).half(), "scales must be float32"),
    ]:
        with pytest.raises(ValueError, match=why):
            dialect.linear_nm_int8.pack(weight, NM(2, 4), bad)
        with pytest.raises(ValueError, match=why):
            dialect.linear_bitmask_int8.pack(weight, bad)
    with pytest.raises(ValueError, match=r"scales must have shape \[1, 1\], got \[1\]"):
        dialect.linear_nm_int4.pack(weight, NM(2, 4), 32, torch.tensor([1.0]).half())
    with pytest.raises(ValueError, match="1e\\+06 in row 0 is too large for int4"):
        dialect.linear_bitmask_int4.pack(weight * 1e6 / 3, 32)
    with pytest.raises(ValueError, match="group must be 32, 64 or 128, got 16"):
        dialect.linear_bitmask_int4.pack(weight, 16)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_function_body_alone_equals_the_reference(pattern, storage):
    columns = 133 if isinstance(pattern, Unstructured) else 5 * pattern.m
    stored = pack(pattern_weight(pattern, 7, columns), pattern, storage)
    for bias in (torch.randn(7, generator=torch.Generator().manual_seed(3)), None):
        for rank in (2, 3):
            x = tokens(columns, rank)
            (got,) = bare_session(stored, bias, rank).run(None, {"x": x.numpy()})
            assert_equals_reference(torch.from_numpy(got), x, stored, bias)


EDGES = {
    "no values at all": torch.zeros(3, 8),
    "full": pattern_weight(Unstructured(1e-9), 3, 16),
    "fewer than 8 columns": pattern_weight(Unstructured(0.5), 5, 3),
    "empty rows first and last": torch.cat([torch.zeros(2, 70), torch.ones(2, 70), torch.zeros(1, 70)]),
    "one weight": torch.tensor([[2.0]]),
    "64 columns": pattern_weight(Unstructured(0.5), 5, 64, 4),
    "a kept weight with code 0": torch.tensor([[1.0, 1e-6, 0.0, 2.0]]),
}


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("edge", EDGES)
def test_bitmask_edges(edge, storage):
    weight = EDGES[edge]
    stored = pack(weight, Unstructured(0.5), storage)
    bias = torch.arange(float(len(weight)))
    x = tokens(weight.shape[1], 2)
    (got,) = bare_session(stored, bias, 2).run(None, {"x": x.numpy()})
    assert_equals_reference(torch.from_numpy(got), x, stored, bias)
    assert_equals_reference(run_op(x, stored, bias), x, stored, bias)


def run_op(x: torch.Tensor, stored: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    op = getattr(torch.ops.sparsify, stored.op)
    return op(x, *stored.tensors.values(), bias, *stored.attributes.values())


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_torch_op_equals_the_reference(pattern, storage):
    columns = 133 if isinstance(pattern, Unstructured) else 5 * pattern.m
    stored = pack(pattern_weight(pattern, 6, columns), pattern, storage)
    for bias in (torch.arange(6.0), None):
        for x in (tokens(columns, 3), tokens(columns, 2), tokens(columns, 2)[0], tokens(columns, 3).transpose(0, 1)):
            got = run_op(x, stored, bias)
            assert got.shape == (*x.shape[:-1], 6)
            assert_equals_reference(got, x, stored, bias)
    assert run_op(torch.zeros(0, 3, columns), stored, None).shape == (0, 3, 6)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_torch_op_keeps_its_promises(pattern, storage):
    stored = pack(pattern_weight(pattern, 6, 8), pattern, storage)
    for bias in (None, torch.zeros(6)):
        arguments = (tokens(8, 3), *stored.tensors.values(), bias, *stored.attributes.values())
        op = getattr(torch.ops.sparsify, stored.op).default
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("storage", QUANTISED, ids=str)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_tokens_that_are_zero_tiny_or_not_finite(pattern, storage: Storage):
    weight = pattern_weight(pattern, 6, 72)
    stored = pack(weight, pattern, storage)
    bias = torch.arange(6.0)
    x = tokens(72, 2)[0].repeat(6, 1)
    x[0] = 0
    x[1] *= 1e-38  # its step is below the smallest normal number
    x[2, 70], x[3, 5], x[4, 71] = torch.nan, torch.inf, -torch.inf
    (by_functions,) = bare_session(stored, bias, 2).run(None, {"x": x.numpy()})
    for got in (torch.from_numpy(by_functions), run_op(x, stored, bias), reference(x, stored, bias)):
        assert torch.equal(got[:2], bias.expand(2, 6))
        assert got[2:5].isnan().all()
        assert_equals_reference(got[5:], x[5:], stored, bias)


def test_storage_refuses_a_group_that_does_not_go_with_it():
    for kind, group in (("int4", 0), ("int4", 16), ("int8", 32), ("fp32", 32)):
        with pytest.raises(ValueError, match="group"):
            Storage(kind, group)


def test_storages_and_patterns_name_six_ops():
    names = {op_name(pattern, storage) for pattern in (NM(2, 4), Unstructured(0.5)) for storage in STORAGES}
    assert names == set(OPS)


def test_function_of_no_tokens():
    for storage in STORAGES:
        stored = pack(pattern_weight(NM(2, 4), 6, 8), NM(2, 4), storage)
        (got,) = bare_session(stored, None, 2).run(None, {"x": np.zeros((0, 8), np.float32)})
        assert got.shape == (0, 6)
