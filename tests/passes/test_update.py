"""The update of weights inside the pipeline: the right Hessian for every weight, and what is left alone."""

import pytest
import torch
from sparsify_export.calibrate.besa import Learning
from sparsify_export.calibrate.masks import keep_mask
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.calibrate.update import relative_error, update
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.run import run_model, run_part
from sparsify_export.passes.pipeline import prune
from sparsify_export.passes.recipe import Quantise, Recipe
from toys import export, stack, weights

METHODS = ["sparsegpt", "admm", "cg", "admm-cg", "alps"]
TWO_OF_FOUR = NM(2, 4)
UP, DOWN = "model.layers.0.up.weight", "model.layers.0.down.weight"


def inputs(count=2, rows=4, tokens=40, width=8):
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(width, width, generator=generator)
    return [Batch((torch.randn(rows, tokens, width, generator=generator) @ mix,), None) for _ in range(count)]


def pruned(model=None, pattern=TWO_OF_FOUR, *, batches=None, notes=None, **recipe):
    program = export(model or stack(), torch.randn(3, 5, 8))
    params = weights(program)
    before = dict(params)
    note = notes.append if notes is not None else lambda text: None
    reports = prune(partition(program), params, Recipe(pattern, **recipe), batches or inputs(), note=note)
    return params, before, {linear.path: linear for block in reports for linear in block.linears}, reports


def observed(model, batches):
    """What the two linears of the first block read, and a second moment of it."""
    x = torch.cat([model.first(batch.inputs[0]).flatten(0, 1) for batch in batches])
    return x, model.layers[0].up(x).relu()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.6)], ids=str)
def test_every_method_makes_the_pattern_with_less_error(method, pattern):
    chooses = ["score"] if method == "cg" else ["score", "update"]
    plain = pruned(pattern=pattern, score="wanda")[3]
    for mask_from in chooses:
        params, _, linears, reports = pruned(pattern=pattern, score="wanda", update=method, mask_from=mask_from)
        for path, linear in linears.items():
            weight = params[f"model.{path}.weight"]
            if method != "sparsegpt":  # a sweep over 8 columns has too few to its right
                assert linear.error_after < linear.error_before
            if pattern == TWO_OF_FOUR:
                assert (weight != 0).reshape(len(weight), -1, 4).sum(-1).eq(2).all()
            assert abs(int((weight == 0).sum()) - pattern.sparsity * weight.numel()) <= 0.5 * len(weight)
            assert not bool(torch.signbit(weight[weight == 0]).any())
        assert method == "sparsegpt" or reports[0].error < plain[0].error


@pytest.mark.parametrize("method", METHODS)
def test_the_errors_reported_are_those_of_the_outputs_though_channels_moved(method):
    model, batches = stack(), inputs()
    params, before, linears, reports = pruned(model, batches=batches, update=method, mask_from="score")
    assert reports[0].folds
    x, hidden = observed(model, batches)
    biases = before["model.layers.0.up.bias"].tolist()
    order = [biases.index(value) for value in params["model.layers.0.up.bias"].tolist()]
    for read, new, old, path in (
        (x, params[UP], before[UP][order], "layers.0.up"),
        (hidden[:, order], params[DOWN], before[DOWN][:, order], "layers.0.down"),
    ):
        wanted = ((read @ (new - old).mT).norm() / (read @ old.mT).norm()) ** 2
        assert linears[path].error_after == pytest.approx(wanted.item(), rel=1e-3)
        masked = torch.where(new != 0, old, 0.0)
        wanted = ((read @ (masked - old).mT).norm() / (read @ old.mT).norm()) ** 2
        assert linears[path].error_before == pytest.approx(wanted.item(), rel=1e-3)


def test_without_an_update_there_is_no_layer_error():
    linears = pruned()[2]
    assert {(linear.error_before, linear.error_after) for linear in linears.values()} == {(None, None)}


def test_a_weight_that_two_blocks_share_keeps_its_values():
    model = stack()
    model.layers[1].up.weight = model.layers[0].up.weight
    params, before, linears, _ = pruned(model, update="admm-cg", mask_from="update", permute="none")
    shared = params["model.layers.1.up.weight"]
    assert torch.equal(shared[shared != 0], before["model.layers.1.up.weight"][shared != 0])
    assert linears["layers.0.up"].error_after is None
    assert linears["layers.0.down"].error_after < linears["layers.0.down"].error_before


def test_a_weight_read_twice_in_a_block_is_fitted_to_both_inputs():
    class Twice(torch.nn.Module):
        def __init__(self, up):
            super().__init__()
            self.up = up

        def forward(self, x):
            return x + self.up(self.up(x).relu())

    model = stack()
    for i in (0, 1):
        model.layers[i] = Twice(torch.nn.Linear(8, 8, bias=False).requires_grad_(False))
    batches = inputs()
    params, before, linears, _ = pruned(model, batches=batches, update="cg", permute="none")
    x = torch.cat([model.first(batch.inputs[0]).flatten(0, 1) for batch in batches])
    both = torch.cat([x, model.layers[0].up(x).relu()])
    new, old = params[UP], before[UP]
    wanted = relative_error(new, old, both.mT @ both)
    assert linears["layers.0.up"].error_after == pytest.approx(wanted, rel=1e-3)


def test_too_few_tokens_raise_the_damping_and_say_so():
    notes = []
    batches = [Batch((torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1)),), None)]
    pruned(batches=batches, notes=notes, update="sparsegpt", mask_from="update", damping=0.0)
    assert any(
        note.startswith("layers.0.down: its Hessian is not positive definite as it is; --damping raised to 0.")
        for note in notes
    )
    notes.clear()
    pruned(notes=notes, update="sparsegpt", mask_from="update")
    assert not notes


def test_a_hessian_that_no_damping_helps_names_the_linear_and_the_flag(monkeypatch):
    def hopeless(hessian, method, damping):
        raise ValueError("the Hessian is not positive definite with any damping from 0.01 to 10")

    monkeypatch.setattr("sparsify_export.passes.update.prepare", hopeless)
    why = r"^layers\.0\.up: the Hessian is not positive definite .* from 0\.01 to 10; give a larger --damping"
    with pytest.raises(InputError, match=why):
        pruned(update="sparsegpt")


@pytest.mark.parametrize("method", ["sparsegpt", "admm-cg"])
def test_the_number_of_threads_decides_nothing(method):
    model, threads, found = stack(width=64, hidden=256), torch.get_num_threads(), []
    batches = inputs(width=64, tokens=64)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            program = export(model, torch.randn(3, 5, 64))
            params = weights(program)
            recipe = Recipe(TWO_OF_FOUR, update=method, mask_from="update")
            found.append((params, prune(partition(program), params, recipe, batches)))
    finally:
        torch.set_num_threads(threads)
    (one, reports), (two, same) = found
    assert [report.folds for report in reports] == [report.folds for report in same]
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("method", ["admm", "admm-cg", "alps"])
def test_admm_chooses_among_as_many_weights_of_a_row_as_were_learned(method):
    half, learning = Unstructured(0.5), Learning(step_size=0.5)
    given = {"pattern": half, "score": "wanda", "allocation": learning, "update": method}
    fixed, *_ = pruned(mask_from="score", **given)
    chosen, _, linears, _ = pruned(mask_from="update", **given)
    first = "model.layers.0.up.weight"  # whose block reads the same in both
    counts = (chosen[first] == 0).sum(dim=1)
    assert torch.equal(counts, (fixed[first] == 0).sum(dim=1))
    assert len(counts.unique()) > 1
    assert not torch.equal(chosen[first] == 0, fixed[first] == 0)
    zeros = sum(int((chosen[f"model.{path}.weight"] == 0).sum()) for path in linears)
    assert zeros == sum(chosen[f"model.{path}.weight"].numel() for path in linears) // 2


@pytest.mark.parametrize(
    ("per", "method", "undone"), [("pattern", "alps", "patterns"), ("row", "sparsegpt", "rates")], ids=str
)
def test_a_mask_that_would_undo_what_was_learned_is_refused(per, method, undone):
    given = {"allocation": Learning(per=per), "update": method}
    with pytest.raises(ValueError, match=f"update {method} with mask_from update undoes the {undone} learned"):
        Recipe(Unstructured(0.5), mask_from="update", **given)
    assert Recipe(Unstructured(0.5), **given).mask_from == "score"


def repetitive(width=64, different=3):
    """A few tokens, again and again."""
    tokens = torch.randn(different, width, generator=torch.Generator().manual_seed(5))
    return [Batch((tokens.repeat(1, 100, 1),), None) for _ in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_little_text_does_not_ruin_what_it_does_not_show(method):
    """On tokens that calibration never saw, the model is not much worse than by the mask alone."""
    other = torch.randn(1, 200, 64, generator=torch.Generator().manual_seed(6))
    program = export(stack(width=64, hidden=128), torch.randn(3, 5, 64))
    parts, dense, error = partition(program), weights(program), {}
    for name in ("none", method):
        params = dict(dense)
        chooses = "score" if name in ("none", "cg") else "update"
        prune(parts, params, Recipe(TWO_OF_FOUR, update=name, mask_from=chooses), repetitive())
        made, wanted = (run_model(parts, (other,), each, run_part) for each in (params, dense))
        error[name] = float((made - wanted).norm() / wanted.norm())
        largest = max(float(params[key].abs().max() / dense[key].abs().max()) for key in (UP, DOWN))
        assert largest < 20
    assert error[method] < 1.5 * error["none"]


@pytest.mark.parametrize("method", METHODS)
def test_an_update_that_makes_a_layer_worse_at_any_damping_is_refused_and_said(monkeypatch, method):
    def worse(weight, inputs, target, **options):
        keep = target if isinstance(target, torch.Tensor) else keep_mask(weight.abs(), target, "row")
        return torch.where(keep, 3 * weight, 0.0), keep

    monkeypatch.setattr("sparsify_export.passes.update.update", worse)
    notes, masks = [], "score" if method == "cg" else "update"
    params, _, linears, _ = pruned(update=method, mask_from=masks, notes=notes, permute="none")
    alone, *_ = pruned(permute="none")
    for path, linear in linears.items():
        assert torch.equal(params[f"model.{path}.weight"], alone[f"model.{path}.weight"])
        assert linear.error_after == linear.error_before > 0
        assert linear.refused.startswith("would make its layer worse with any damping")
        assert sum(note.startswith(f"{path}: its update would make its layer worse") for note in notes) == 1


def test_more_damping_comes_before_refusal(monkeypatch):
    def better_when_damped(weight, inputs, target, **options):
        new, keep = update(weight, inputs, target, **options)
        return (new if options["cautious"] else 3 * new), keep

    monkeypatch.setattr("sparsify_export.passes.update.update", better_when_damped)
    notes = []
    linears = pruned(update="alps", mask_from="update", notes=notes)[2]
    for path, linear in linears.items():
        assert linear.error_after < linear.error_before
        assert linear.refused == "made its layer worse below a damping of 0.1"
        assert f"{path}: its update made its layer worse below a damping of 0.1" in notes


class Three(torch.nn.Module):
    """Three linears of one input, and a fourth of another; the first is fused of two."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = (torch.nn.Linear(8, n, bias=False) for n in (16, 8, 8, 8))

    def forward(self, x):
        a, b = self.one(x).chunk(2, dim=-1)
        return x + self.four((a + b) * self.two(x) + self.three(x))


@pytest.mark.parametrize("quantise", [None, Quantise(Storage("int8"), "sweep")], ids=["update", "and sweep to a grid"])
def test_what_depends_on_the_input_alone_is_factored_once_an_input(monkeypatch, quantise):
    """Cholesky's factors cost C^3: two an input, of the Hessian and of its inverse, for each of update and grid."""
    model, calls = stack(), []
    for i in (0, 1):
        model.layers[i] = Three().requires_grad_(False)
    for name in ("cholesky", "cholesky_ex"):
        real = getattr(torch.linalg, name)

        def counted(*arguments, real=real, **options):
            calls.append(real)
            return real(*arguments, **options)

        monkeypatch.setattr(torch.linalg, name, counted)
    monkeypatch.setattr("sparsify_export.passes.update.cost", lambda *them: 0.0)  # no second try with more damping
    _, _, linears, _ = pruned(model, update="sparsegpt", quantise=quantise, permute="none")
    assert [linear.error_after is not None for linear in linears.values()] == [True] * 8
    assert len(calls) == 2 * 2 * 2 * (1 if quantise is None else 2)


def test_text_that_shows_too_little_is_told_once():
    notes = []
    program = export(stack(width=64, hidden=128), torch.randn(3, 5, 64))
    recipe = Recipe(TWO_OF_FOUR, update="alps", mask_from="update")
    reports = prune(partition(program), weights(program), recipe, repetitive(), note=notes.append)
    assert reports[0].linears[0].directions == 3
    (told,) = [note for note in notes if note.startswith("calibration shows")]
    assert told.startswith("calibration shows 3 of the 128 directions that the inputs of layers.0.down have")
    notes.clear()
    enough = prune(partition(program), weights(program), recipe, inputs(width=64, tokens=100), note=notes.append)
    assert enough[0].linears[0].directions in (63, 64)  # a norm takes the mean off; rounding may put the last one back
    assert not notes
