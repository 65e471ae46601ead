"""Which inputs of linears are scaled, and that the scale is that of what the pruned model computes."""

import math

import numpy as np
import pytest
import torch
from sparsify_export.calibrate.eight_bit import Magnitudes
from sparsify_export.passes.activations import scale_activations
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
from torch import nn
from toys import Stack, export, stack, weights

X = torch.randint(-3, 4, (6, 8), generator=torch.Generator().manual_seed(0)).float()
PATHS = {f"layers.{layer}.{name}" for layer in range(2) for name in ("up", "down")}


def whole():
    """Two blocks, each with a linear behind a linear; whole numbers, so that every sum is exact in any order."""
    model = stack()
    for parameter in model.parameters():
        parameter.data = (parameter.data * 4).round()
    return model


@pytest.fixture(scope="module")
def toy():
    """The same, traced."""
    program = export(whole(), X)
    return partition(program), weights(program)


def scaled(traced, x=X, *, paths=PATHS, mask=None, batches=1, kind="int8"):
    parts, params = traced
    masks = [None] * batches if mask is None else mask.split(len(x) // batches)
    chunks = [Batch((each,), m) for each, m in zip(x.split(len(x) // batches), masks, strict=True)]
    return scale_activations(parts, params, chunks, paths=paths, kind=kind)


def by_path(found):
    return {linear.path: group.scale for group in found for linear in group.linears}


def inputs_of(model, x):
    """What every linear of the blocks reads, run by torch itself."""
    found, x = {}, model.first(x)
    for layer, block in enumerate(model.layers):
        found[f"layers.{layer}.up"] = x
        found[f"layers.{layer}.down"] = block.up(x).relu()
        x = block(x)
    return found


@pytest.mark.parametrize(("batches", "kind"), [(1, "int8"), (3, "int8"), (2, "fp8")])
def test_scales_are_those_of_what_the_linears_read(toy, batches, kind):
    wanted = {}
    for path, x in inputs_of(whole(), X).items():
        magnitudes = Magnitudes()
        magnitudes.update(x)
        wanted[path] = magnitudes.scale(kind)
    assert by_path(scaled(toy, batches=batches, kind=kind)) == wanted


def test_the_weights_given_are_what_runs_and_only_these_paths_are_scaled(toy):
    params = toy[1] | {"model.layers.0.up.weight": torch.zeros(16, 8)}
    (group,) = scaled((toy[0], params), paths={"layers.0.down"})
    largest = float(whole().layers[0].up.bias.relu().max().half())
    assert group.scale <= float(np.float16(largest / 127))  # nothing is left of the first linear but its bias


def test_padding_does_not_count(toy):
    x = X.clone()
    x[1::2] = math.nan
    mask = torch.tensor([True, False] * 3)
    assert by_path(scaled(toy, x, mask=mask)) == by_path(scaled(toy, X[::2]))


class Shared(nn.Module):
    """A block whose linears read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.q(x) * self.k(x)


def test_linears_that_read_the_same_input_share_its_scale():
    torch.manual_seed(0)
    model = Stack()
    model.layers = nn.ModuleList([Shared(), Shared()])
    program = export(model, X)
    traced = partition(program), weights(program)
    found = scaled(traced, paths={f"layers.{i}.{name}" for i in range(2) for name in "qk"})
    assert [[linear.path for linear in group.linears] for group in found] == [
        ["layers.0.q", "layers.0.k"],
        ["layers.1.q", "layers.1.k"],
    ]
    (group, _) = scaled(traced, paths={"layers.0.q", "layers.1.k"})
    assert group.scale == found[0].scale
    assert len(group.linears) == 1


def test_a_weight_that_two_blocks_read_is_left_alone():
    model = stack()
    model.layers[1].up.weight = model.layers[0].up.weight
    program = export(model, X)
    assert set(by_path(scaled((partition(program), weights(program))))) == {"layers.0.down", "layers.1.down"}


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        (0.0, r"layers\.0\.up: its activations are all zero.*leave it out with --skip layers\.0\.up"),
        (math.nan, r"layers\.0\.up: 48 activations are NaN"),
    ],
)
def test_inputs_without_a_scale_are_refused_by_name(toy, bias, said):
    params = toy[1] | {"model.first.weight": torch.zeros(8, 8), "model.first.bias": torch.full((8,), bias)}
    with pytest.raises(InputError, match=said):
        scaled((toy[0], params))


def test_without_a_token_there_is_no_scale(toy):
    with pytest.raises(InputError, match=r"layers\.0\.up: no calibration token reached this layer"):
        scaled(toy, mask=torch.zeros(6, dtype=torch.bool))
