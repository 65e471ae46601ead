"""Fine-tuning on networks small enough to check by hand."""

import math

import pytest
import torch
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.run import run_part, run_part_with_grad, start
from sparsify_export.passes.pipeline import prune
from sparsify_export.passes.recipe import Recipe, Tune
from sparsify_export.passes.tune import Sample, learning_rates, tune_part
from toys import export, stack, weights

KEYS = ["model.layers.0.up.weight", "model.layers.0.down.weight"]


def inputs(count=9, rows=3, tokens=5):
    generator = torch.Generator().manual_seed(3)
    return [Batch((torch.randn(rows, tokens, 8, generator=generator),), None) for _ in range(count)]


class Toy:
    """The first block of a small stack, pruned 2:4 by hand, and its samples."""

    def __init__(self, batches=None):
        program = export(stack(), torch.randn(3, 5, 8))
        self.parts, self.dense = partition(program), weights(program)
        self.names, self.block = self.parts.params, self.parts.blocks[0]
        self.params = dict(self.dense)
        for key in KEYS:
            keep = torch.tensor([True, False, False, True]).repeat(self.dense[key].shape[1] // 4)
            self.params[key] = torch.where(keep, self.dense[key], 0.0)
        self.samples = [self.sample(batch) for batch in batches or inputs()]

    def sample(self, batch):
        values = start(self.parts, batch.inputs)
        values.update(run_part(self.parts.parts[0], values, self.dense, self.names))
        return Sample(values, run_part(self.block, values, self.dense, self.names), batch.token_mask)

    def loss(self, samples):
        wrong = size = 0.0
        for sample in samples:
            made = run_part(self.block, sample.inputs, self.params, self.names)
            for name, target in sample.targets.items():
                mask = torch.ones(target.shape[:-1]) if sample.token_mask is None else sample.token_mask.float()
                wrong += float(((made[name] - target).square() * mask[..., None]).double().sum())
                size += float((target.square() * mask[..., None]).double().sum())
        return wrong / size

    def tune(self, **settings):
        settings = {"epochs": 3, "tokens_per_step": 15, **settings}
        return tune_part(self.block, self.samples, self.params, self.names, KEYS, Tune(**settings))


def test_the_loss_falls_and_is_what_the_report_says():
    toy = Toy()
    held_out = [toy.samples[7]]  # the eighth of nine decides
    before = toy.loss(held_out)
    report = toy.tune()
    assert report.before == pytest.approx(before)
    assert report.after == pytest.approx(toy.loss(held_out))
    assert report.after < 0.9 * report.before
    assert report.linears == ("layers.0.up", "layers.0.down")
    assert report.epochs == 3


def test_zeros_stay_zeros_and_nothing_else_moves():
    toy = Toy()
    start_from = dict(toy.params)
    copies = {key: value.clone() for key, value in start_from.items()}
    toy.tune()
    for key, value in toy.params.items():
        if key not in KEYS:
            assert value is start_from[key]
            continue
        zero = start_from[key] == 0
        assert value[zero].eq(0).all()
        assert not torch.signbit(value[zero]).any()
        assert value[~zero].ne(start_from[key][~zero]).any()  # not all: some never get a gradient
        assert not value.requires_grad
    assert all(torch.equal(start_from[key], copies[key]) for key in copies)


def test_gradients_are_those_of_finite_differences():
    toy = Toy(inputs(1))
    (sample,) = toy.samples
    live = {key: value.double() for key, value in toy.params.items()}
    weight = live[KEYS[1]].requires_grad_()
    sample = Sample({k: v.double() for k, v in sample.inputs.items()}, sample.targets, None)
    (target,) = sample.targets.values()

    def loss():
        (made,) = run_part_with_grad(toy.block, sample.inputs, live, toy.names).values()
        return (made - target).square().sum()

    (grad,) = torch.autograd.grad(loss(), weight)
    for i, j in ((0, 0), (3, 4), (7, 15)):
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[i, j] += step
                ends.append(loss().item())
                weight[i, j] -= step
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(grad[i, j].item(), rel=1e-6)


def test_the_first_step_by_hand():
    """One step of AdamW from nothing moves every weight that has a gradient by the learning rate, against its sign."""
    toy = Toy(inputs(1))
    found = learning_rates(toy.block, toy.samples[0], toy.params, toy.names, KEYS, rate=1e-3)
    peaks = dict(zip(KEYS, found, strict=True))
    before, (sample,) = dict(toy.params), toy.samples
    live = {key: toy.params[key].clone().requires_grad_() for key in KEYS}
    made = run_part_with_grad(toy.block, sample.inputs, {**toy.params, **live}, toy.names)
    sum((made[name] - target).square().sum() for name, target in sample.targets.items()).backward()
    report = toy.tune(epochs=1, rate=1e-3)
    assert report.after < report.before
    factor = (1 + math.cos(math.pi / 2)) / 2  # the middle of the only step is half-way down the cosine
    for key in KEYS:
        keep = before[key] != 0
        moved = (toy.params[key] - before[key])[keep]
        expected = -(live[key].grad[keep]).sign() * peaks[key] * factor
        torch.testing.assert_close(moved, expected, rtol=1e-2, atol=1e-7)


def test_a_step_of_the_learning_rate_moves_the_output_by_that_fraction_of_the_error():
    toy = Toy(inputs(1))
    (sample,) = toy.samples
    made = run_part(toy.block, sample.inputs, toy.params, toy.names)
    ((name, target),) = sample.targets.items()
    rates = learning_rates(toy.block, sample, toy.params, toy.names, KEYS, rate=0.01)
    generator = torch.Generator().manual_seed(4)
    for key, rate in zip(KEYS, rates, strict=True):
        steps = []
        for _ in range(50):
            sign = torch.randn(toy.params[key].shape, generator=generator).sign()
            moved = toy.params[key] + sign * rate * (toy.params[key] != 0)
            after = run_part(toy.block, sample.inputs, {**toy.params, key: moved}, toy.names)[name]
            steps.append(float((after - made[name]).norm() / (made[name] - target).norm()))
        assert 0.005 < sum(steps) / len(steps) < 0.02  # one shake of 64 weights is not the mean of all


def test_what_the_output_does_not_depend_on_is_not_moved():
    toy = Toy(inputs(1))
    toy.params[KEYS[1]] = torch.zeros_like(toy.params[KEYS[1]])
    before = toy.params[KEYS[0]]
    assert learning_rates(toy.block, toy.samples[0], toy.params, toy.names, KEYS, rate=1.0) == [0.0, 0.0]
    report = toy.tune()
    assert report.after == report.before
    assert toy.params[KEYS[0]] is before


def test_never_worse_than_before():
    toy = Toy()
    before = dict(toy.params)
    report = toy.tune(rate=300.0, epochs=5)
    assert report.after == report.before
    assert report.epochs == 2  # without a gain, no more are tried
    assert all(toy.params[key] is before[key] for key in before)


def test_a_loss_that_is_not_finite_is_refused():
    toy = Toy()
    with pytest.raises(InputError, match=r"layers\.0: the loss of fine-tuning is (nan|inf) after epoch 1.*--tune-lr"):
        toy.tune(rate=1e25)


def test_padding_does_not_count():
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(1, length, 8, generator=generator) for length in (5, 3, 4)]
    batches, alone = [], []
    for row in rows:
        padded = torch.full((1, 5, 8), 1e3)
        mask = torch.zeros(1, 5, dtype=torch.bool)
        padded[0, 5 - row.shape[1] :], mask[0, 5 - row.shape[1] :] = row[0], True
        batches.append(Batch((padded,), mask))
        alone.append(Batch((row,), None))
    padded, plain = Toy(batches), Toy(alone)
    reports = [toy.tune(tokens_per_step=4) for toy in (padded, plain)]
    assert reports[0].after == pytest.approx(reports[1].after)
    for key in KEYS:
        torch.testing.assert_close(padded.params[key], plain.params[key], rtol=1e-4, atol=1e-6)


def test_gradients_accumulate_over_the_batches_of_a_step():
    apart, together = Toy(inputs(4, rows=1)), Toy()
    values = [batch.inputs[0] for batch in inputs(4, rows=1)]
    together.samples = [together.sample(Batch((torch.cat(pair),), None)) for pair in (values[:3], values[3:])]
    # Batch sizes differ, the steps do not: three rows are trained on in one step, the last row decides.
    found = [toy.tune(epochs=2, tokens_per_step=15) for toy in (apart, together)]
    assert found[0].after == pytest.approx(found[1].after)
    for key in KEYS:
        torch.testing.assert_close(apart.params[key], together.params[key], rtol=1e-4, atol=1e-6)


def test_the_number_of_threads_decides_nothing():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            toy = Toy()
            found.append((toy.tune(), toy.params))
    finally:
        torch.set_num_threads(threads)
    for report, params in found[1:]:
        assert report == found[0][0]
        assert all(torch.equal(params[key], found[0][1][key]) for key in KEYS)


@pytest.mark.parametrize("scope", ["halves", "block"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)])
def test_in_the_pipeline(pattern, scope):
    program = export(stack(), torch.randn(3, 5, 8))
    errors, found = [], []
    for tune in (None, Tune(scope=scope, epochs=3, tokens_per_step=15)):
        params = weights(program)
        reports = prune(partition(program), params, Recipe(pattern, tune=tune), inputs())
        errors.append([report.error for report in reports])
        found.append(params)
        assert [len(report.tuned) for report in reports] == ([0, 0] if tune is None else [1, 1])
    assert all(tuned < plain for plain, tuned in zip(*errors, strict=True))
    for key in KEYS:
        assert torch.equal(found[0][key] == 0, found[1][key] == 0)


def test_dense_linears_are_not_trained():
    program = export(stack(), torch.randn(3, 5, 8))
    params = weights(program)
    before = dict(params)
    recipe = Recipe(NM(2, 4), permute="none", skip=("*.up",), tune=Tune(epochs=1, tokens_per_step=15))
    reports = prune(partition(program), params, recipe, inputs())
    assert [report.tuned[0].linears for report in reports] == [("layers.0.down",), ("layers.1.down",)]
    assert params["model.layers.0.up.weight"] is before["model.layers.0.up.weight"]
