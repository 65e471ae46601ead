"""Running parts: plainly, with a look inside, with rounded activations, and in float64."""

import pytest
import torch
from sparsify_export.calibrate.matmul import linear
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.run import (
    live_after,
    observe_part,
    run_part,
    run_part_changed,
    run_part_float64,
    run_part_rounded,
    run_part_with_grad,
    start,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Block, Cached, Stack, export, stack, weights

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


class NoFloat32(TorchDispatchMode):
    """Fails on every operation that returns float32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            assert not (isinstance(value, Tensor) and value.dtype == torch.float32), f"{func} returned float32"
        return result


class Casting(Block):
    """A block that casts, makes a constant and splits, as norms and masks do."""

    def forward(self, x: Tensor) -> Tensor:
        half, other = super().forward(x).to(torch.float32).chunk(2, dim=-1)
        scale = torch.full((1,), 0.5, dtype=torch.float32)
        return torch.cat([half * scale, other.softmax(-1, dtype=torch.float32)], dim=-1)


def cast_stack() -> Stack:
    model = stack()
    model.layers[0] = Casting(8, 16)
    return model.requires_grad_(False)


def test_float64_is_float64_throughout():
    program = export(cast_stack(), X)
    parts, params = partition(program), {k: v.double() for k, v in weights(program).items()}
    values = start(parts, (X.double(),))
    with NoFloat32():
        for part in parts.parts:
            values.update(run_part_float64(part, values, params, parts.params))
    result = values[parts.outputs[0]]
    assert result.dtype == torch.float64


def test_float64_takes_float32_values_and_weights_as_they_are():
    model = stack()
    program = export(model, X)
    parts, params = partition(program), weights(program)
    values = start(parts, (X,))
    for part in parts.parts:
        values.update(run_part_float64(part, values, params, parts.params))
    assert torch.equal(values[parts.outputs[0]], model.double()(X.double()))
    assert all(weight.dtype == torch.float32 for weight in params.values())


@pytest.mark.parametrize("fast", [True, False])
def test_rounds_the_inputs_of_the_named_linears_and_no_others(fast):
    model = stack()
    program = export(model, X)
    parts, params = partition(program), weights(program)
    seen = []

    def coarse(x: Tensor) -> Tensor:
        seen.append(x)
        return x.round()

    values, rounded = start(parts, (X,)), {"model.layers.1.down.weight": coarse}
    for part in parts.parts:
        values.update(run_part_rounded(part, values, params, parts.params, rounded, fast=fast))
    block = model.layers[1]
    x = model.layers[0](model.first(X))
    hidden = block.up(x).relu()
    assert len(seen) == 1
    assert torch.allclose(seen[0], hidden, atol=1e-6)
    wanted = model.last(x + block.down(seen[0].round()))
    assert torch.allclose(values[parts.outputs[0]], wanted, atol=1e-6)
    assert fast or torch.equal(values[parts.outputs[0]], wanted)


def test_a_gradient_passes_rounded_inputs_straight_through():
    model = stack()
    program = export(model, X)
    parts, params = partition(program), weights(program)
    up, down = "model.layers.0.up.weight", "model.layers.0.down.weight"
    live = {**params, up: params[up].clone().requires_grad_(), down: params[down].clone().requires_grad_()}
    values = start(parts, (X,))
    values.update(run_part(parts.parts[0], values, params, parts.params))
    made = run_part_with_grad(parts.parts[1], values, live, parts.params, {down: torch.round})
    made[parts.parts[1].outputs[0]].sum().backward()
    block, x = model.layers[0], model.first(X)
    hidden = block.up(x)
    towards = (hidden > 0) * params[down].sum(dim=0)  # as if nothing were rounded
    assert torch.allclose(live[up].grad, torch.einsum("bth,btc->hc", towards, x), atol=1e-5)
    seen = hidden.relu().round().sum(dim=(0, 1))
    assert torch.allclose(live[down].grad, seen.expand(8, -1), atol=1e-5)


def test_observes_exactly_the_inputs_of_the_linears_and_changes_nothing():
    model = stack()
    program = export(model, X)
    parts, params = partition(program), weights(program)
    values = start(parts, (X,))
    values.update(run_part(parts.parts[0], values, params, parts.params))
    block = parts.parts[1]
    seen = {}
    see = {found.input: lambda x, name=found.input: seen.setdefault(name, []).append(x) for found in block.linears}
    before = dict(values)
    observed = observe_part(block, values, params, parts.params, see)
    assert values == before
    plain = run_part(block, values, params, parts.params)
    assert observed.keys() == plain.keys() == set(block.outputs)
    assert all(torch.equal(observed[name], plain[name]) for name in plain)
    x = linear(X, model.first.weight, model.first.bias)
    up, down = (found.input for found in block.linears)
    assert {name: len(calls) for name, calls in seen.items()} == {up: 1, down: 1}
    assert torch.equal(seen[up][0], x)
    assert torch.equal(seen[down][0], linear(x, model.layers[0].up.weight, model.layers[0].up.bias).relu())


def test_only_what_later_parts_read_stays_alive():
    parts = partition(export(Cached(layers=3).requires_grad_(False), X))
    prologue, *blocks, _ = parts.parts
    (table,) = set(prologue.outputs) & set(blocks[0].inputs) & set(blocks[2].inputs)
    made = set(parts.inputs)
    for part, later, alive in zip(parts.parts, parts.parts[1:], live_after(parts), strict=False):
        made |= set(part.outputs)
        (carried,) = set(part.outputs) & set(later.inputs) - {table}
        assert alive & made == ({table, carried} if later in blocks else {carried})
    assert len(parts.outputs) == 4
    assert live_after(parts)[-1] == set()


def test_what_linears_return_can_be_changed_and_gradients_reach_it():
    """A probe of zeros behind each linear: its gradient is that of the linear's output, told by torch's own module."""
    model = stack()
    program = export(model, X)
    parts, params = partition(program), weights(program)
    block, seen = parts.blocks[0], {}

    def change(linear, x, y):
        probe = torch.zeros_like(y, requires_grad=True)
        seen[linear.path] = (x, probe)
        return 2 * y + probe

    values = {name: X for name in block.inputs if name not in parts.params}
    (made,) = run_part_changed(block, values, params, parts.params, change).values()
    own = model.layers[0]
    up = 2 * own.up(X)
    assert torch.allclose(made, X + 2 * own.down(up.relu()), atol=1e-6)
    made.sum().backward()
    assert torch.equal(seen["layers.0.up"][0], X)
    assert torch.allclose(seen["layers.0.down"][1].grad, torch.ones_like(X))
    assert torch.allclose(seen["layers.0.up"][1].grad, 2 * (torch.ones_like(X) @ own.down.weight) * (up > 0), atol=1e-6)
