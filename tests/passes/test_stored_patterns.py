"""A weight is stored by the pattern that it was pruned to, as small as the format says, whatever it looks like."""

import math

import pytest
import torch
from sparsify_export.calibrate.besa import Learning
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.dialect.storage import FP32, Storage
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.rewrite import lower_linears, stored_weights
from sparsify_export.passes.given_masks import GivenMasks
from sparsify_export.passes.recipe import Quantise, Recipe
from sparsify_export.passes.sparsify import sparsify
from toys import export, stack, weights

WIDTH, HIDDEN = 48, 96
BLOCKS = ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down")
BITS = {2: 1, 3: 2, 4: 2, 6: 4, 8: 4}
"""Of a position in a group: the table "The format" of the README."""


def compiled(pattern, storage=FP32, zero=None, **recipe):
    """The linears of the blocks as lowered, the packed weights and the pruned ones."""
    program = export(stack(width=WIDTH, hidden=HIDDEN), torch.randn(3, 5, WIDTH))
    params, x = weights(program), torch.randn(4, 2, 20, WIDTH, generator=torch.Generator().manual_seed(3))
    if zero:
        params[zero] = torch.zeros_like(params[zero])
    if storage.quantised:
        recipe["quantise"] = Quantise(storage, "rtn")
    batches = [Batch((batch,), None) for batch in x]
    done = sparsify(partition(program), params, Recipe(pattern, **recipe), batches, output="values")
    program.state_dict.update({key: params[key] for key in program.state_dict})
    lowered = lower_linears(program, storage=storage, on_grid=done.on_grid, patterns=done.patterns)
    inside = {entry.linear.path: entry for entry in lowered if entry.linear.path in BLOCKS}
    return inside, stored_weights(program, lowered), params, done


@pytest.mark.parametrize("nm", [NM(2, 8), NM(1, 8), NM(1, 3), NM(3, 6), NM(4, 8), NM(1, 2), NM(7, 8)], ids=str)
def test_n_of_m_is_stored_as_it_was_asked_for(nm):
    inside, stored, params, _ = compiled(nm)
    for entry in inside.values():
        assert (entry.op, entry.pattern, entry.attributes) == ("linear_nm", str(nm), {"n": nm.n, "m": nm.m})
        kept = entry.linear.in_features * nm.n // nm.m
        rows = entry.linear.out_features
        assert entry.stored_bytes == rows * kept * 4 + rows * math.ceil(kept * BITS[nm.m] / 8)
        assert torch.equal(stored[entry.linear.weight].unpack(), params[entry.linear.weight])


@pytest.mark.parametrize("storage", [FP32, Storage("int8"), Storage("int4", 32)], ids=lambda storage: storage.kind)
@pytest.mark.parametrize("update", ["none", "alps"])
def test_few_zeros_are_stored_as_a_bitmask(storage, update):
    recipe = {"update": "alps", "mask_from": "update"} if update == "alps" else {}
    inside, stored, params, done = compiled(Unstructured(0.25), storage, **recipe)
    assert len(done.on_grid) == (4 if storage.quantised else 0)
    for entry in inside.values():
        assert entry.op.startswith("linear_bitmask")
        assert entry.stored_bytes < entry.dense_bytes
        weight = params[entry.linear.weight]
        assert (weight == 0).float().mean() >= 0.24
        assert torch.equal(stored[entry.linear.weight].unpack(), weight)


def test_learned_rates_below_a_third_are_stored_as_bitmasks():
    inside, _, params, done = compiled(Unstructured(0.2), allocation=Learning(epochs=1))
    assert [entry.op for entry in inside.values()] == ["linear_bitmask"] * 4
    zeros = sum(int((params[entry.linear.weight] == 0).sum()) for entry in inside.values())
    assert zeros == math.floor(0.2 * 4 * WIDTH * HIDDEN + 0.5)
    assert {report.pattern for block in done.blocks for report in block.linears} <= {f"0.{i:03}" for i in range(400)}


def test_a_learned_pattern_is_stored_as_it_was_learned():
    learning = Learning(per="pattern", patterns=(NM(3, 6), NM(1, 3)), epochs=1)
    inside, _, _, done = compiled(Unstructured(0.6), allocation=learning)
    learned = {report.path: report.pattern for block in done.blocks for report in block.linears}
    assert {path: entry.pattern for path, entry in inside.items()} == learned
    assert set(learned.values()) <= {"3:6", "1:3"}
    assert {entry.op for entry in inside.values()} == {"linear_nm"}


def test_groups_in_a_given_mask_are_found_and_few_zeros_in_it_are_enough(tmp_path):
    two_of_four = torch.tensor([True, True, False, False]).repeat(HIDDEN, WIDTH // 4)
    scattered = torch.rand(WIDTH, HIDDEN, generator=torch.Generator().manual_seed(1)) >= 0.1
    given = GivenMasks(tmp_path / "masks", {"layers.0.up": two_of_four, "layers.0.down": scattered})
    inside, _, _, _ = compiled(given.pattern, given=given, permute="none")
    assert (inside["layers.0.up"].op, inside["layers.0.up"].pattern) == ("linear_nm", "2:4")
    assert inside["layers.0.down"].op == "linear_bitmask"
    assert inside["layers.1.up"].reason == "the weight is dense"


@pytest.mark.parametrize("storage", [FP32, Storage("int8"), Storage("int4", 32)], ids=lambda storage: storage.kind)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_a_weight_of_zeros_only_stays_dense_and_says_why(storage, pattern):
    inside, stored, _, done = compiled(pattern, storage, zero="model.layers.1.up.weight")
    entry = inside["layers.1.up"]
    assert (entry.op, entry.pattern, entry.reason) == ("MatMul", None, "the weight is zero everywhere")
    assert len(stored) == 3
    assert entry.linear.weight not in done.on_grid
