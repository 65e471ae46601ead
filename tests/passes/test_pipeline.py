"""Pruning block by block on networks small enough to check by hand."""

import pytest
import torch
from reference import fraction_keep_mask, nm_keep_mask
from reference import wanda as slow_wanda
from sparsify_export.calibrate.besa import Learning
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes import block as one_block
from sparsify_export.passes import permute, pipeline
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.errors import InputError, VerificationError
from sparsify_export.passes.form import Form
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx import run
from sparsify_export.passes.fx.fold import apply_fold
from sparsify_export.passes.fx.linears import Linear
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.run import advance
from sparsify_export.passes.pipeline import _reasons, prune
from sparsify_export.passes.recipe import Quantise, Recipe, Timings
from toys import Cached, export, stack, weights

HALF, TWO_OF_FOUR = Unstructured(0.5), NM(2, 4)


def inputs(count: int = 2, rows: int = 3, tokens: int = 5, width: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [Batch((torch.randn(rows, tokens, width, generator=generator),), None) for _ in range(count)]


def pruned(model=None, pattern=TWO_OF_FOUR, batches=None, *, timings=None, progress=None, **recipe):
    """The weights after pruning, those before, and the reports."""
    program = export(model or stack(), torch.randn(3, 5, 8))
    params = weights(program)
    before = dict(params)
    told = {"progress": progress} if progress else {}
    reports = prune(partition(program), params, Recipe(pattern, **recipe), batches or inputs(), timings=timings, **told)
    return params, before, reports


def linears(reports):
    return {linear.path: linear for block in reports for linear in block.linears}


BLOCKS = [f"layers.{i}.{name}" for i in (0, 1) for name in ("up", "down")]


def test_every_linear_of_every_block_and_nothing_else():
    params, before, reports = pruned(permute="none")
    assert [report.path for report in reports] == ["layers.0", "layers.1"]
    assert list(linears(reports)) == BLOCKS
    for key, weight in params.items():
        path = key.removeprefix("model.").removesuffix(".weight")
        if path not in BLOCKS:
            assert weight is before[key]
            continue
        report = linears(reports)[path]
        assert (report.pattern, report.reason, report.sparsity) == ("2:4", "", 0.5)
        assert report.shape == tuple(weight.shape)
        groups = (weight != 0).reshape(len(weight), -1, 4).sum(-1)
        assert groups.eq(2).all()
        kept = weight != 0
        assert torch.equal(weight[kept], before[key][kept])
        assert not torch.signbit(weight[~kept]).any()
        assert report.retained_before == report.retained_after


def test_the_weights_of_the_model_are_not_written_to():
    program = export(stack(), torch.randn(3, 5, 8))
    held = weights(program)
    copies = {key: value.clone() for key, value in held.items()}
    prune(partition(program), dict(held), Recipe(NM(2, 4)), inputs())
    assert all(torch.equal(held[key], copies[key]) for key in held)


def test_the_first_linear_by_hand_with_wanda():
    model, batches = stack(), inputs()
    params, before, _ = pruned(model, batches=batches, score="wanda", permute="none")
    x = torch.cat([model.first(batch.inputs[0]).flatten(0, 1) for batch in batches])
    score = slow_wanda(before["model.layers.0.up.weight"], x.norm(dim=0))
    keep = nm_keep_mask(score, 2, 4)
    assert torch.equal(params["model.layers.0.up.weight"] != 0, keep)


def test_the_second_block_sees_what_the_pruned_first_block_makes():
    model, batches = stack(), inputs()
    params, before, _ = pruned(model, batches=batches, score="wanda", permute="none")
    for name in ("up", "down"):
        getattr(model.layers[0], name).weight.copy_(params[f"model.layers.0.{name}.weight"])
    x = torch.cat([model.layers[0](model.first(batch.inputs[0])).flatten(0, 1) for batch in batches])
    keep = nm_keep_mask(slow_wanda(before["model.layers.1.up.weight"], x.norm(dim=0)), 2, 4)
    assert torch.equal(params["model.layers.1.up.weight"] != 0, keep)


@pytest.mark.parametrize("score", ["ria", "wanda", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_unstructured_counts_are_exact_in_the_group_of_the_score(score, sparsity):
    params, _, reports = pruned(pattern=Unstructured(sparsity), score=score)
    for path in BLOCKS:
        zeros = params[f"model.{path}.weight"] == 0
        if score == "wanda":
            assert zeros.sum(dim=1).eq(int(sparsity * zeros.shape[1] + 0.5)).all()
        else:
            assert int(zeros.sum()) == int(sparsity * zeros.numel() + 0.5)
        assert linears(reports)[path].pattern == f"{sparsity:g}"
        assert linears(reports)[path].sparsity == pytest.approx(zeros.float().mean().item())
    assert not any(report.folds for report in reports)


def test_magnitude_by_hand():
    params, before, _ = pruned(pattern=HALF, score="magnitude")
    key = "model.layers.1.down.weight"
    assert torch.equal(params[key] != 0, fraction_keep_mask(before[key].abs(), 64, "matrix"))


def test_the_scores_differ_and_so_does_the_power_of_ria():
    # Activations of very different size, or magnitude and Wanda would agree.
    batches = [Batch((batch.inputs[0] * torch.logspace(-2, 2, 8),), None) for batch in inputs()]
    recipes = [{"score": name} for name in ("magnitude", "wanda", "ria")] + [{"score": "ria", "ria_power": 0.0}]
    masks = [pruned(batches=batches, permute="none", **r)[0]["model.layers.0.up.weight"] != 0 for r in recipes]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_padding_does_not_count():
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(1, length, 8, generator=generator) for length in (5, 3)]
    padded = torch.full((2, 5, 8), 1e3)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    for i, row in enumerate(rows):
        padded[i, -row.shape[1] :], mask[i, -row.shape[1] :] = row[0], True
    together = pruned(batches=[Batch((padded,), mask)], permute="none")[0]
    alone = pruned(batches=[Batch((row,), None) for row in rows], permute="none")[0]
    counted = pruned(batches=[Batch((padded,), None)], permute="none")[0]
    assert all(torch.equal(together[key], alone[key]) for key in alone)
    assert any(not torch.equal(counted[key], alone[key]) for key in alone)


def test_skipped_layers_stay_dense_and_say_so():
    params, before, reports = pruned(skip=("*.down", "layers.0.*"), permute="none")
    found = {path: linear.reason for path, linear in linears(reports).items()}
    assert found == {path: "" if path == "layers.1.up" else "skipped by --skip" for path in BLOCKS}
    assert params["model.layers.1.down.weight"] is before["model.layers.1.down.weight"]
    assert linears(reports)["layers.1.down"].pattern is None
    assert linears(reports)["layers.1.down"].retained_after is None


def test_a_block_in_which_nothing_is_pruned_has_no_error():
    _, _, reports = pruned(skip=("layers.0.*",), permute="none")
    assert reports[0].error == 0.0
    assert reports[1].error > 0.0


def test_block_error_by_hand():
    model, (batch,) = stack(layers=1), inputs(1)
    params, _, (report,) = pruned(model, batches=[batch], permute="none")
    x = model.first(batch.inputs[0])
    dense = model.layers[0](x)
    for name in ("up", "down"):
        getattr(model.layers[0], name).weight.copy_(params[f"model.layers.0.{name}.weight"])
    wanted = (model.layers[0](x) - dense).norm() / dense.norm()
    assert report.error == pytest.approx(wanted.item(), rel=1e-5)


def test_features_that_do_not_divide_stay_dense_with_the_reason():
    _, _, reports = pruned(stack(hidden=18), permute="none")
    found = {path: linear.reason for path, linear in linears(reports).items()}
    why = "in_features 18 is not a multiple of 4"
    assert found == {path: why if path.endswith("down") else "" for path in BLOCKS}


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({"pattern": NM(3, 5)}, r"no linear is left to prune; layers\.0\.up: in_features 8 is not a multiple of 5"),
        ({"skip": ("*",)}, r"no linear is left to prune; layers\.0\.up: skipped by --skip"),
        ({"skip": ("*.q_proj",)}, r"--skip \*\.q_proj matches none of the 4 linears, e\.g\. layers\.0\.up"),
        ({"skip": ("*.UP",)}, "matches none"),
    ],
)
def test_recipes_that_are_refused(recipe, why):
    with pytest.raises(InputError, match=why):
        pruned(**recipe)


def test_nan_in_the_activations_names_the_layer():
    batch = inputs(1)[0]
    batch.inputs[0][0, 2, 3] = float("nan")
    with pytest.raises(InputError, match=r"^layers\.0\.up: activations hold NaN or infinity in 8 of 8 input features"):
        pruned(batches=[batch])


def test_nan_in_a_weight_names_the_layer():
    model = stack()
    model.layers[1].down.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"^layers\.1\.down: weight holds NaN"):
        pruned(model, permute="none")


def test_nothing_but_padding_names_the_layer():
    (batch,) = inputs(1)
    with pytest.raises(InputError, match=r"^layers\.0\.up: no calibration token reached this layer"):
        pruned(batches=[Batch(batch.inputs, torch.zeros(3, 5, dtype=torch.bool))])


def test_folding_keeps_more_and_changes_no_block():
    model = stack()
    params, before, reports = pruned(model)
    plain = linears(pruned(permute="none")[2])
    for block in reports:
        (fold,) = block.folds
        assert fold.name == f"{block.path}.down columns 0..15"
        assert fold.channels == 16
        assert fold.retained_after > fold.retained_before
        report = linears(reports)[f"{block.path}.down"]
        assert report.retained_after == pytest.approx(fold.retained_after, rel=1e-6)
        assert report.retained_before == pytest.approx(fold.retained_before, rel=1e-6)
        assert report.retained_after > report.retained_before
    assert linears(reports)["layers.0.down"].retained_before == plain["layers.0.down"].retained_before
    # The rows of up and the columns of down moved together: what was kept is what the model held.
    for path in BLOCKS:
        weight, source = params[f"model.{path}.weight"], before[f"model.{path}.weight"]
        assert torch.isin(weight[weight != 0], source).all()
    order = [before["model.layers.0.up.bias"].tolist().index(v) for v in params["model.layers.0.up.bias"].tolist()]
    assert order != sorted(order)
    up, down = params["model.layers.0.up.weight"], params["model.layers.0.down.weight"]
    assert torch.equal(up[up != 0], before["model.layers.0.up.weight"][order][up != 0])
    assert torch.equal(down[down != 0], before["model.layers.0.down.weight"][:, order][down != 0])


def test_a_wrong_fold_ends_the_compilation_and_is_named(monkeypatch):
    def wrong(space, order, params, *, only_present=False):
        moved = dict(params)
        apply_fold(space, order, moved, only_present=only_present)
        producers = {moved.param for moved in space.producers}
        params.update({key: value for key, value in moved.items() if key in producers})

    monkeypatch.setattr(permute, "apply_fold", wrong)
    why = r"^layers\.0: folding .*layers\.0\.down columns 0\.\.15 changed its output: max error .* allowed"
    with pytest.raises(VerificationError, match=why):
        pruned()


def test_a_weight_that_two_blocks_share_is_never_folded():
    model = stack()
    model.layers[1].up.weight = model.layers[0].up.weight
    params, before, reports = pruned(model)
    assert [len(report.folds) for report in reports] == [0, 0]
    shared = params["model.layers.1.up.weight"]
    assert (shared != 0).reshape(16, -1, 4).sum(-1).eq(2).all()
    assert torch.equal(shared[shared != 0], before["model.layers.1.up.weight"][shared != 0])


def test_a_tied_weight_keeps_the_mask_of_its_first_block():
    model = stack()
    model.layers[1].up.weight = model.layers[0].up.weight
    for pattern in (NM(2, 4), HALF):
        both = pruned(model, pattern, permute="none")[0]["model.layers.1.up.weight"]
        first = pruned(model, pattern, permute="none", skip=("layers.1.*",))[0]["model.layers.1.up.weight"]
        assert torch.equal(both, first)


def test_nothing_of_the_cache_is_kept(monkeypatch):
    """The KV cache of all batches, of one block even, can be larger than all that the next block reads."""
    parts = partition(program := export(Cached(layers=4).requires_grad_(False), torch.randn(3, 5, 8)))
    cache, seen = set(parts.outputs[1:]), []

    def watched(part, values, params, names, kept):
        made = advance(part, values, params, names, kept)
        read = {name for later in parts.parts[parts.parts.index(part) + 1 :] for name in later.inputs}
        seen.append((part.path, bool(cache & set(made)), set(values) - read))
        return made

    for module in (run, one_block, pipeline):
        monkeypatch.setattr(module, "advance", watched)
    learning = Learning(reference="dense", epochs=1)
    prune(
        parts,
        weights(program),
        Recipe(HALF, allocation=learning),
        inputs(),
        cache=[(f"past {name}", name) for name in cache],
    )
    # Two batches, pruned and dense, and the check; what the last block returns is made in the epilogue.
    assert sum(made for _, made, _ in seen) == 3 * 5
    assert {path for path, _, _ in seen} == {"", *(part.path for part in parts.blocks)}
    assert not any(left for _, _, left in seen), seen


def test_progress_counts_blocks_and_every_stage_is_timed():
    seen, timings = [], Timings()
    pruned(timings=timings, progress=lambda *step: seen.append(step))
    assert seen == [("pruning", 1, 2), ("pruning", 2, 2)]
    stages = {"observe", "score", "channel spaces", "permutation search", "fold", "mask", "update", "tune", "quantise"}
    stages.add("propagate")
    assert timings.seconds.keys() == stages
    assert all(seconds >= 0 for seconds in timings.seconds.values())


def test_the_number_of_threads_decides_nothing():
    model = stack(width=64, hidden=256)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            program = export(model, torch.randn(3, 5, 64))
            params = weights(program)
            reports = prune(partition(program), params, Recipe(NM(2, 4)), inputs(width=64, tokens=64))
            found.append((params, [report.folds for report in reports]))
    finally:
        torch.set_num_threads(threads)
    (one, folds), (two, same) = found
    assert folds == same
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_whole_recipe_gives_the_same_bits_at_the_same_number_of_threads():
    """Two, on tensors that torch cuts in two for them: 38,400 numbers behind the activation."""
    recipe = Recipe(NM(2, 4), update="alps", mask_from="update", quantise=Quantise(Storage("int8"), "sweep"))
    threads = torch.get_num_threads()
    found = []
    try:
        torch.set_num_threads(2)
        for _ in range(2):
            params = weights(program := export(stack(width=32, hidden=128), torch.randn(3, 5, 32)))
            prune(partition(program), params, recipe, inputs(width=32, tokens=100))
            found.append(params)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_budget_leaves_dense_what_the_pattern_would_fit():
    linears = [
        Linear(name, name, "x", f"{name}.weight", None, 8, width)
        for name, width in zip("abcd", (8, 6, 8, 6), strict=True)
    ]
    named = _reasons(linears, Recipe(NM(2, 4), budgeted=("a", "b")), {})
    misfit = "in_features 6 is not a multiple of 4"
    assert named == {"a": "the budget leaves it dense", "b": misfit, "c": "", "d": misfit}
    forms = (("c", Form(Unstructured(0.5))), ("d", Form(None, Storage("int8", blocked=True))))
    free = _reasons(linears, Recipe(NM(2, 4), budgeted=("a", "b"), forms=forms), {})
    assert free == {"a": "the budget leaves it dense", "b": "the budget leaves it dense", "c": "", "d": ""}
