"""Masks from a file: used as they are, and refused by name where they do not fit."""

import pytest
import torch
from safetensors.torch import save_file
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.given_masks import read_masks
from sparsify_export.passes.pipeline import prune
from sparsify_export.passes.recipe import Recipe
from toys import export, stack, weights

UP, DOWN = "layers.0.up", "layers.1.down"  # [16, 8] and [8, 16]


def two_of_four(rows: int, columns: int, seed: int) -> torch.Tensor:
    order = torch.rand(rows, columns // 4, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return (order < 2).reshape(rows, columns)


@pytest.fixture
def write(tmp_path):
    def save(masks):
        save_file(masks, tmp_path / "masks.safetensors")
        return tmp_path / "masks.safetensors"

    return save


def pruned(file, pattern=None, **how):
    """The weights after pruning by a file, those before, and every linear's report."""
    given = read_masks(file)
    program = export(stack(), torch.randn(3, 5, 8))
    params = weights(program)
    before = dict(params)
    batches = [Batch((torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3)),), None)]
    recipe = Recipe(pattern or given.pattern, permute="none", given=given, **how)
    blocks = prune(partition(program), params, recipe, batches)
    return params, before, {linear.path: linear for block in blocks for linear in block.linears}


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_the_zeros_are_those_of_the_masks(write, pattern):
    keep = {UP: two_of_four(16, 8, 0), DOWN: two_of_four(8, 16, 1)}
    file = write({f"{UP}.weight": keep[UP], DOWN: keep[DOWN].to(torch.uint8)})
    params, before, reports = pruned(file, pattern)
    for key, weight in params.items():
        path = key.removeprefix("model.").removesuffix(".weight")
        if path in keep:
            assert torch.equal(weight, torch.where(keep[path], before[key], 0.0))
            assert reports[path].pattern == "2:4"  # found in the zeros where it was not asked for
            assert reports[path].retained_before == reports[path].retained_after < 1
        else:
            assert weight is before[key]
    assert reports["layers.0.down"].reason == "masks.safetensors has no mask for it"


def test_any_mask_is_taken_and_counted(write):
    keep = torch.ones(16, 8, dtype=torch.bool)
    keep[0, :6] = False
    params, _, reports = pruned(write({UP: keep, DOWN: torch.ones(8, 16, dtype=torch.bool)}))
    assert torch.equal(params[f"model.{UP}.weight"] != 0, keep)
    assert reports[UP].sparsity == 6 / 128
    assert reports[DOWN].reason == "masks.safetensors keeps all of it"


@pytest.mark.parametrize("update", ["sparsegpt", "admm", "cg", "admm-cg", "alps"])
def test_an_update_keeps_the_masks_and_lowers_the_error(write, update):
    keep = {UP: two_of_four(16, 8, 0), DOWN: two_of_four(8, 16, 1)}
    params, before, reports = pruned(write(dict(keep)), update=update)
    for path, mask in keep.items():
        weight = params[f"model.{path}.weight"]
        assert not weight[~mask].any()
        assert not torch.equal(weight[mask], before[f"model.{path}.weight"][mask])
        assert reports[path].error_after < reports[path].error_before


def test_the_whole_file_is_one_fraction(write):
    masks = {UP: two_of_four(16, 8, 0), DOWN: torch.ones(8, 16, dtype=torch.uint8)}
    assert read_masks(write(masks)).pattern == Unstructured(0.25)


def test_the_first_group_that_breaks_the_pattern_is_named(write):
    keep = two_of_four(8, 16, 0)
    keep[5, 8:12] = torch.tensor([True, True, False, True])
    keep[7] = True
    with pytest.raises(InputError, match=rf"{DOWN} is not 2:4: it keeps 3 in row 5, columns 8 to 11$"):
        pruned(write({DOWN: keep}), NM(2, 4))
    with pytest.raises(InputError, match="8 in_features are no multiple of 16"):
        pruned(write({UP: two_of_four(16, 8, 0)}), NM(8, 16))


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        ({"layers.7.up": two_of_four(16, 8, 0)}, r"layers.7.up is none of the 4 linears, e.g. layers.0.up"),
        ({UP: two_of_four(8, 16, 0)}, r"layers.0.up has shape \[8, 16\], its weight \[16, 8\] \(out, in\)"),
        ({UP: torch.rand(16, 8)}, "layers.0.up holds float32; want bool, or uint8 0 and 1"),
        ({UP: torch.full((16, 8), 2, dtype=torch.uint8)}, "layers.0.up holds uint8; want bool, or uint8 0 and 1"),
        ({UP: torch.zeros(16, 8, dtype=torch.bool)}, "layers.0.up keeps nothing"),
        ({UP: torch.ones(16, 8, dtype=torch.bool)}, "no mask that prunes anything"),
        ({}, "no mask that prunes anything"),
        ({UP: two_of_four(16, 8, 0), f"{UP}.weight": two_of_four(16, 8, 0)}, "two masks for layers.0.up"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(write, masks, reason):
    with pytest.raises(InputError, match=reason):
        pruned(write(masks))


def test_a_damaged_or_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none.safetensors"):
        read_masks(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    with pytest.raises(InputError, match=r"cannot read .*bad.safetensors"):
        read_masks(tmp_path / "bad.safetensors")
