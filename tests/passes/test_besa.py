"""BESA inside the pipeline, on networks small enough to follow."""

import math

import pytest
import torch
from sparsify_export.calibrate import besa
from sparsify_export.calibrate.besa import Learning
from sparsify_export.calibrate.patterns import NM, Unstructured, find_pattern
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.pipeline import prune
from sparsify_export.passes.recipe import Recipe
from toys import export, stack, weights

BLOCKS = [f"layers.{i}.{name}" for i in (0, 1) for name in ("up", "down")]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(besa, "LEAST_STEPS", 16)


def inputs(count=4, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    return [Batch((scale * torch.randn(3, 5, 8, generator=generator),), None) for _ in range(count)]


def learned(model=None, sparsity=0.5, batches=None, *, skip=(), told=None, score="wanda", **learning):
    """The weights after pruning and those before, by path; and the reports."""
    program = export(model or stack(), torch.randn(3, 5, 8))
    params = weights(program)
    before = dict(params)
    recipe = Recipe(Unstructured(sparsity), score, skip=skip, allocation=Learning(**learning))
    progress = {"progress": told} if told else {}
    reports = prune(partition(program), params, recipe, batches or inputs(), **progress)
    after, before = ({path: p[f"model.{path}.weight"] for path in BLOCKS} for p in (params, before))
    return after, before, reports


def zeros(weight):
    return (weight == 0).sum(dim=1)


@pytest.mark.parametrize("sparsity", [0.01, 0.37, 0.99])
@pytest.mark.parametrize("per", ["row", "layer"])
def test_the_total_is_the_target_to_the_weight(sparsity, per):
    after, before, reports = learned(sparsity=sparsity, per=per)
    size = sum(weight.numel() for weight in before.values())
    assert sum(int(zeros(weight).sum()) for weight in after.values()) == math.floor(sparsity * size + 0.5)
    for path, weight in after.items():
        assert torch.equal(weight[weight != 0], before[path][weight != 0])
        assert not torch.signbit(weight[weight == 0]).any()
        if per == "layer":
            assert zeros(weight).max() - zeros(weight).min() <= 1
    for block in reports:
        for linear in block.linears:
            assert linear.pattern == f"{linear.sparsity:.3f}"
            assert linear.sparsity == pytest.approx(1 - (after[linear.path] != 0).float().mean().item())


@pytest.mark.parametrize(
    "learning",
    [{"step_size": 0.3}, {"step_size": 0.3, "width": None}, {"step_size": 1.0, "width": None, "bounded": True}],
)
def test_rows_that_nobody_reads_lose_most(learning):
    model = stack()
    model.layers[0].down.weight[:, :8] *= 1e-3  # so rows 0 to 7 of up hardly matter
    after, _, reports = learned(model, **learning)
    lost = zeros(after["layers.0.up"])
    assert lost[:8].float().mean() > lost[8:].float().mean()
    program = export(model, torch.randn(3, 5, 8))
    plain = prune(partition(program), weights(program), Recipe(Unstructured(0.5), "wanda"), inputs())
    assert reports[0].error < plain[0].error


def test_only_the_blocks_behind_the_first_see_which_reference_is_taken():
    pruned, dense = (learned(reference=reference, step_size=0.5)[0] for reference in ("pruned", "dense"))
    same = {path: torch.equal(pruned[path], dense[path]) for path in BLOCKS}
    assert same["layers.0.up"]
    assert same["layers.0.down"]
    assert not (same["layers.1.up"] and same["layers.1.down"])


def test_skipped_linears_stay_and_do_not_count():
    after, before, _ = learned(skip=("*.down",))
    assert all(torch.equal(after[path], before[path]) for path in BLOCKS if path.endswith("down"))
    assert [int(zeros(after[path]).sum()) for path in BLOCKS if path.endswith("up")] == [64, 64]


@pytest.mark.parametrize("per", ["row", "layer", "pattern"])
def test_a_block_that_is_skipped_stays_whole(per):
    after, before, reports = learned(skip=("layers.0.*",), per=per)
    for path in BLOCKS[:2]:
        assert torch.equal(after[path], before[path])
    assert [linear.pattern for linear in reports[0].linears] == [None, None]
    size = sum(before[path].numel() for path in BLOCKS[2:])
    assert sum(int(zeros(after[path]).sum()) for path in BLOCKS[2:]) >= size // 2


def test_padding_does_not_count():
    rows = [torch.randn(1, length, 8, generator=torch.Generator().manual_seed(length)) for length in (5, 3)]
    padded = [Batch((torch.nn.functional.pad(x, (0, 0, 2, 0), value=1e3),), None) for x in rows]
    masks = [torch.arange(x.shape[1] + 2)[None] >= 2 for x in rows]
    alone = learned(batches=[Batch((x,), None) for x in rows])[0]
    together = learned(batches=[Batch(b.inputs, m) for b, m in zip(padded, masks, strict=True)])[0]
    assert all(torch.equal(alone[path], together[path]) for path in BLOCKS)


def test_at_least_128_steps_are_taken_and_told(monkeypatch):
    monkeypatch.undo()
    seen = []
    learned(told=lambda *step: seen.append(step))
    steps = [step for step in seen if step[0] == "learning rates of layers.1"]
    assert steps == [("learning rates of layers.1", done, 128) for done in range(1, 129)]
    assert Learning().steps(300) == 300
    assert Learning(epochs=2).steps(100) == 200
    assert Learning().steps(100) == 200


def test_a_loss_that_is_not_finite_names_the_block():
    with pytest.raises(InputError, match=r"^layers\.0: BESA's loss is nan after 0 of 16 steps"):
        learned(batches=inputs(scale=1e30))


@pytest.mark.parametrize("wrong", [{"step_size": 0.0}, {"epochs": 0}, {"width": -1.0}, {"penalty": float("nan")}])
def test_learning_refuses(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} wants more than 0, got"):
        Learning(**wrong)


def test_the_number_of_threads_decides_nothing():
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(learned()[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][path], found[1][path]) for path in BLOCKS)


def test_patterns_are_chosen_for_every_linear_and_prune_enough():
    model = stack()
    model.layers[0].down.weight *= 10  # so layers.0.down matters most, by far
    after, before, reports = learned(model, per="pattern", step_size=0.3)
    sizes = {path: weight.numel() for path, weight in before.items()}
    chosen = {}
    for path, weight in after.items():
        found = find_pattern(weight)
        chosen[path] = 0.0 if found is None else found.sparsity
        assert torch.equal(weight[weight != 0], before[path][weight != 0])
    assert set(chosen.values()) <= {0.0, 0.5, 0.75}
    for layer in ("layers.0", "layers.1"):
        total = sum(chosen[path] * sizes[path] for path in BLOCKS if path.startswith(layer))
        assert total >= 0.5 * 256
    found = {linear.path: linear for block in reports for linear in block.linears}
    assert {path: linear.sparsity for path, linear in found.items()} == chosen
    names = {0.0: {"0.000"}, 0.5: {"2:4", "4:8"}, 0.75: {"1:4"}}
    assert all(found[path].pattern in names[rate] for path, rate in chosen.items())


def test_patterns_that_cannot_prune_enough_name_the_block():
    with pytest.raises(InputError, match=r"^layers\.0: no choice of patterns prunes 154 weights; the most is 128"):
        learned(sparsity=0.6, per="pattern", patterns=(None, NM(2, 4)))


@pytest.mark.parametrize("score", ["ria", "hessian"])
def test_any_score_gives_the_order(score):
    after, _, _ = learned(score=score)
    other, _, _ = learned(score="wanda")
    assert sum(int(zeros(weight).sum()) for weight in after.values()) == 256
    assert any(not torch.equal(after[path], other[path]) for path in BLOCKS)
