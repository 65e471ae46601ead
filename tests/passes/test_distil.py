"""Training all blocks together, on networks small enough to check against the formulas."""

import math

import pytest
import torch
from sparsify_export.passes.distil import distil
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.run import run_part_float64, start
from sparsify_export.passes.recipe import Distil
from toys import export, stack, weights

KEYS = [f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("up", "down")]
KEEP = torch.tensor([True, False, False, True])


def inputs(count=9, tokens=5, mask=None):
    generator = torch.Generator().manual_seed(3)
    return [Batch((torch.randn(3, tokens, 8, generator=generator),), mask) for _ in range(count)]


class Toy:
    """A small stack whose blocks are pruned 2:4 by hand."""

    def __init__(self):
        program = export(stack(), torch.randn(3, 5, 8))
        self.parts, self.dense = partition(program), weights(program)
        self.params = dict(self.dense)
        for key in KEYS:
            weight = self.dense[key]
            self.params[key] = torch.where(KEEP.repeat(weight.shape[1] // 4), weight, 0.0)

    def run(self, params, batch):
        values = start(self.parts, batch.inputs)
        for part in self.parts.parts:
            values.update(run_part_float64(part, values, params, self.parts.params))
        rows = values[self.parts.outputs[0]].flatten(end_dim=-2)
        return rows if batch.token_mask is None else rows[batch.token_mask.reshape(-1)]

    def loss(self, batches, output):
        """The formulas, in float64."""
        wrong = size = 0.0
        for batch in batches:
            want, got = self.run(self.dense, batch), self.run(self.params, batch)
            if output == "logits":
                p, q = want.softmax(-1), got.softmax(-1)
                wrong, size = wrong + float((p * (p / q).log()).sum()), size + len(p)
            else:
                wrong, size = wrong + float((got - want).square().sum()), size + float(want.square().sum())
        return wrong / size

    def distil(self, batches, output="logits", *, epochs=3, rate=0.02, tokens=15, told=None):
        progress = (lambda *args: told.append(args)) if told is not None else (lambda *args: None)
        settings = Distil(epochs, rate, tokens)
        return distil(self.parts, self.dense, self.params, KEYS, batches, settings, output=output, progress=progress)


@pytest.mark.parametrize("output", ["logits", "values"])
def test_the_loss_falls_and_is_the_formula(output):
    toy, batches, told = Toy(), inputs(), []
    held_out = [batches[7]]  # the eighth of nine decides
    before = toy.loss(held_out, output)
    report = toy.distil(batches, output, told=told)
    assert report.before == pytest.approx(before, rel=1e-4)
    assert report.after == pytest.approx(toy.loss(held_out, output), rel=1e-4)
    assert report.after < 0.8 * before
    assert report.epochs == 3
    assert told[-1] == ("distilling", 24, 24)


@pytest.mark.parametrize("output", ["logits", "values"])
def test_batches_of_a_step_count_as_one(output):
    first, second, third = inputs(3)
    both = Batch((torch.cat([first.inputs[0], second.inputs[0]]),), None)
    small, large, apart = Toy(), Toy(), Toy()
    gathered = small.distil([first, second, third], output, tokens=16)  # the last of three decides
    whole = large.distil([both, third], output)
    assert (gathered.before, gathered.epochs) == (whole.before, whole.epochs)
    assert gathered.after == pytest.approx(whole.after, rel=1e-4)
    assert apart.distil([first, second, third], output).after != pytest.approx(whole.after, rel=1e-4)


def test_zeros_stay_and_nothing_else_changes():
    toy = Toy()
    before = dict(toy.params)
    toy.distil(inputs())
    for key, weight in toy.params.items():
        if key in KEYS:
            pruned = ~KEEP.repeat(weight.shape[1] // 4).expand_as(weight)
            assert (weight[pruned] == 0).all()
            assert not torch.signbit(weight[pruned]).any()
            assert not torch.equal(weight, before[key])
        else:
            assert weight is before[key]


def test_an_epoch_that_is_no_better_is_not_kept():
    toy = Toy()
    before = dict(toy.params)
    report = toy.distil(inputs(), epochs=9, rate=1.0)
    assert report.after <= report.before
    assert report.epochs == 9
    if report.after == report.before:
        assert all(toy.params[key] is before[key] for key in before)


def test_padding_does_not_count():
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[:, 3:] = False
    torn = [Batch((torch.where(mask[..., None], b.inputs[0], 1e3),), mask) for b in inputs()]
    one, other = Toy(), Toy()
    first, second = one.distil(inputs(mask=mask)), other.distil(torn)
    assert first == second
    assert all(torch.equal(one.params[key], other.params[key]) for key in KEYS)


def test_a_single_batch_is_trained_on_and_decides():
    toy, batches = Toy(), inputs(1)
    report = toy.distil(batches)
    assert report.after < report.before
    assert report.after == pytest.approx(toy.loss(batches, "logits"), rel=1e-4)


def test_a_dense_model_has_nothing_to_learn():
    toy = Toy()
    toy.params = dict(toy.dense)
    report = toy.distil(inputs(), "values")
    assert report.before == report.after == 0.0
    assert all(toy.params[key] is toy.dense[key] for key in KEYS)


def test_a_loss_that_is_not_finite_names_the_flag():
    toy = Toy()
    toy.dense = {**toy.dense, "model.last.weight": toy.dense["model.last.weight"] * math.inf}
    with pytest.raises(InputError, match="the loss of distillation is nan after epoch 1; try a lower --distil-lr"):
        toy.distil(inputs())
