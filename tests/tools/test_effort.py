"""From flags to recipes."""

from dataclasses import replace

import pytest
from sparsify_export.calibrate.besa import Learning
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.effort import Flags, effort_of, make_recipe
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.recipe import Distil, Moves, Quantise, Recipe, Tune

TWO_OF_FOUR = NM(2, 4)


def recipe(onnx=False, pattern=TWO_OF_FOUR, **flags):
    return make_recipe(pattern, Flags(**flags), onnx=onnx)


def test_balanced_is_the_default_and_fast_changes_no_weight():
    assert recipe() == recipe(effort="balanced") == Recipe(TWO_OF_FOUR, update="alps", mask_from="update")
    assert recipe(effort="fast") == Recipe(TWO_OF_FOUR, update="none", mask_from="score")
    assert recipe(pattern=Unstructured(0.5)).update == "alps"


def test_an_onnx_file_without_inputs_is_scored_and_masked():
    assert effort_of(Flags(), onnx=True) == "fast"
    wanted = Recipe(TWO_OF_FOUR, permute="none")
    assert recipe(onnx=True) == recipe(onnx=True, effort="fast") == recipe(onnx=True, update="none") == wanted


def test_with_inputs_an_onnx_file_is_pruned_as_a_checkpoint_but_for_the_orders():
    for effort in (None, "fast", "balanced"):
        wanted = recipe(effort=effort, permute="none")
        assert recipe(onnx=True, inputs=True, effort=effort) == wanted
        assert recipe(onnx=True, inputs=True, effort=effort, storage=INT4, quantise="sweep") == recipe(
            effort=effort, permute="none", storage=INT4, quantise="sweep"
        )
    assert recipe(onnx=True, inputs=True, storage=INT4).quantise == Quantise(INT4, "sweep")
    assert recipe(onnx=True, inputs=True, effort="fast", storage=INT4).quantise is None


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ({"score": "wanda", "mask_from": "score"}, {}),
        ({"score": "wanda", "mask_from": "update"}, {}),
        ({"permute": "none"}, {}),
        ({"damping": 0.02}, {}),
        ({"hessian": "inputs"}, {}),
        ({"skip": ("*.up",)}, {}),
        ({"ria_power": 1.0, "mask_from": "update"}, {}),
        ({"ria_power": 1.0, "effort": "fast"}, {"update": "none", "mask_from": "score"}),
        ({"mask_from": "score"}, {}),
        ({"update": "sparsegpt"}, {}),
        ({"update": "cg"}, {"mask_from": "score"}),
        ({"update": "none"}, {"mask_from": "score"}),
    ],
)
def test_a_flag_that_is_given_changes_only_itself(flag, changed):
    default = vars(recipe())
    given = {name: value for name, value in flag.items() if name != "effort"}
    assert vars(recipe(**flag)) == {**default, **given, **changed}


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (
            {"score": "wanda"},
            "^--score wanda does not choose what goes: --update alps does; give --mask-from score to prune by it, or "
            "--mask-from update to have it rank channel orders only$",
        ),
        ({"score": "ria", "update": "admm"}, "--score ria does not choose what goes: --update admm does"),
        ({"ria_power": 0.0}, "--ria-power 0.0 does not choose what goes: --update alps does"),
        ({"score": "wanda", "permute": "none"}, "give --mask-from score to prune by it$"),
        ({"score": "wanda", "permute": "none", "mask_from": "update"}, "no effect with --mask-from update"),
        ({"score": "wanda", "pattern": Unstructured(0.5)}, "give --mask-from score to prune by it$"),
        (
            {"score": "wanda", "mask_from": "score", "ria_power": 0.3},
            "--ria-power 0.3 has no effect with --score wanda",
        ),
        ({"permute": "fold", "pattern": Unstructured(0.5)}, "--permute fold has no effect with zeros anywhere"),
        ({"ria_power": float("nan")}, "--ria-power nan is negative"),
    ],
)
def test_a_score_that_chooses_nothing_is_refused(flags, why):
    with pytest.raises(InputError, match=why):
        recipe(**flags)


def test_scores_that_learned_rates_begin_from_are_taken():
    flags = {"allocate": "besa-row", "score": "ria", "ria_power": 0.3}
    assert recipe(pattern=Unstructured(0.5), **flags).ria_power == 0.3


def test_the_seed_goes_where_batches_are_shuffled():
    made = recipe(seed=7, tune="halves", distil=2)
    assert (made.tune.seed, made.distil.seed) == (7, 7)


HALF = Unstructured(0.5)


@pytest.mark.parametrize(
    ("flags", "mask_from"),
    [
        ({"allocate": "besa-row"}, "update"),
        ({"allocate": "besa-layer", "update": "admm"}, "update"),
        ({"allocate": "besa-row", "mask_from": "score"}, "score"),
        ({"allocate": "besa-row", "update": "cg"}, "score"),
        ({"allocate": "besa-row", "update": "sparsegpt"}, "score"),
        ({"allocate": "besa-nm"}, "score"),
        ({"allocate": "besa-row", "update": "none"}, "score"),
    ],
)
def test_admm_chooses_what_rows_lose_and_others_keep_the_mask(flags, mask_from):
    assert recipe(pattern=HALF, **flags).mask_from == mask_from


def test_allocation_learns_rates():
    by_row = recipe(pattern=HALF, allocate="besa-row")
    assert by_row == replace(recipe(pattern=HALF), allocation=Learning())
    by_layer = recipe(pattern=HALF, allocate="besa-layer", besa_optimiser="prodigy", besa_rate_step=0.02, besa_epochs=3)
    assert by_layer.allocation == Learning("layer", "dense", "prodigy", rate_steps=50, epochs=3)
    published = recipe(pattern=HALF, allocate="besa-row", besa_logits="sigmoid", besa_reference="dense")
    assert published.allocation == Learning(reference="dense", bounded=True, width=None)
    patterns = recipe(pattern=HALF, allocate="besa-nm", besa_patterns="1:4,dense").allocation
    assert patterns == Learning("pattern", patterns=(NM(1, 4), None))
    assert recipe(pattern=HALF, allocate="none").allocation is None


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"onnx": True, "allocate": "besa-row"}, "needs the traced model"),
        (
            {"allocate": "besa-nm", "mask_from": "update"},
            "--mask-from update would undo --allocate besa-nm; want score",
        ),
        (
            {"allocate": "besa-row", "mask_from": "update", "update": "sparsegpt"},
            "--update sparsegpt chooses its mask over all rows, which undoes --allocate; want --mask-from score",
        ),
        ({"onnx": True, "score": "hessian"}, "--score hessian goes by what the linears of an .onnx file read; give"),
        ({"allocate": "besa-nm", "besa_logits": "sigmoid"}, "no effect with --allocate besa-nm, which learns no rates"),
        ({"allocate": "besa-row", "besa_patterns": "2:4,dense"}, "no effect without --allocate besa-nm"),
        ({"allocate": "besa-nm", "besa_patterns": "2:4,4:2"}, "--besa-patterns wants names like 4:8"),
        ({"allocate": "besa-nm", "besa_patterns": "2:4,2:4"}, "wants 2 to 8 different patterns"),
        ({"allocate": "besa-nm", "besa_patterns": "3:4,dense"}, "--sparsity 0.5 is out of reach: .* has 0.25"),
    ],
)
def test_allocations_that_are_refused(flags, why):
    with pytest.raises(InputError, match=why):
        recipe(pattern=HALF, **flags)


def test_fast_with_an_update_is_that_update():
    assert recipe(effort="fast", update="admm") == Recipe(TWO_OF_FOUR, update="admm", mask_from="update")


def test_best_is_balanced_and_distillation():
    assert recipe(effort="best") == Recipe(TWO_OF_FOUR, update="alps", mask_from="update", distil=Distil())
    updated = {"update": "alps", "mask_from": "update", "distil": Distil(), "permute": "none"}
    learned = Recipe(HALF, score="wanda", allocation=Learning(), **updated)
    assert recipe(effort="best", pattern=HALF) == learned
    assert recipe(effort="best", pattern=HALF, allocate="none").allocation is None
    assert recipe(effort="best", pattern=HALF, score="ria", besa_epochs=2).allocation == Learning(epochs=2)
    assert recipe(effort="best", distil=0) == recipe()
    assert recipe(effort="best", update="none").distil == Distil()
    assert recipe(effort="best", tune="halves").tune == Tune()
    assert recipe(effort="fast", distil=5, distil_lr=0.25) == Recipe(TWO_OF_FOUR, distil=Distil(5, 0.25))


@pytest.mark.parametrize(
    ("flags", "onnx", "message"),
    [
        ({"distil": -1}, False, "--distil -1 is negative; want a number of epochs, or 0 for none"),
        ({"distil_lr": 0.1}, False, "--distil-lr 0.1 has no effect without --distil EPOCHS"),
        ({"effort": "best", "distil": 0, "distil_lr": 0.1}, False, "--distil-lr 0.1 has no effect without --distil"),
        ({"distil": 2, "distil_lr": 0.0}, False, "--distil-lr 0 is out of range; want above 0, at most 1"),
        ({"distil": 2, "distil_lr": float("nan")}, False, "--distil-lr nan is out of range"),
        ({"distil": 2}, True, "--distil 2 needs the traced model and cannot be had for an .onnx file"),
    ],
)
def test_what_distillation_refuses(flags, onnx, message):
    with pytest.raises(InputError, match=message):
        recipe(onnx=onnx, **flags)


def test_masks_move_where_that_is_asked_for():
    made = recipe(effort="best", mask_moves=5, mask_rank="fisher", mask_pull=0.25)
    assert made.distil == Distil(moves=Moves(5, 0.25, "fisher"))
    assert recipe(distil=2, mask_moves=3).distil == Distil(2, moves=Moves(3))
    assert recipe(effort="best", mask_moves=0) == recipe(effort="best")
    assert recipe(effort="best", storage=INT4, mask_moves=3).quantise.method == "joint"


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"mask_moves": 3}, "^--mask-moves 3 has no effect without --distil EPOCHS$"),
        ({"mask_rank": "fisher"}, "^--mask-rank fisher has no effect without --distil EPOCHS$"),
        ({"mask_pull": 0.0}, "^--mask-pull 0 has no effect without --distil EPOCHS$"),
        ({"effort": "best", "mask_pull": 0.1}, "^--mask-pull 0.1 has no effect where masks stay; want --mask-moves"),
        ({"effort": "best", "mask_moves": -1}, "^--mask-moves -1 is negative; want a number of steps, or 0 for none$"),
        (
            {"effort": "best", "mask_moves": 1, "mask_pull": 1.0},
            "^--mask-pull 1 is out of range; want 0 to less than 1$",
        ),
        ({"effort": "best", "mask_moves": 1, "mask_pull": float("nan")}, "^--mask-pull nan is out of range"),
        (
            {"effort": "best", "mask_moves": 1, "storage": Storage("int8"), "quantise": "sweep"},
            "^--mask-moves 1 cannot be had with --quantise rtn or sweep, whose grid is made for a mask$",
        ),
    ],
)
def test_masks_that_cannot_move_are_refused(flags, why):
    with pytest.raises(InputError, match=why):
        recipe(**flags)


def test_any_effort_may_end_with_fine_tuning():
    assert recipe(tune="halves") == Recipe(TWO_OF_FOUR, update="alps", mask_from="update", tune=Tune())
    assert recipe(effort="fast", tune="block") == Recipe(TWO_OF_FOUR, tune=Tune("block"))
    assert recipe(tune="halves", tune_epochs=9, tune_lr=0.5).tune == Tune("halves", 9, 0.5)


@pytest.mark.parametrize(
    ("flags", "onnx", "message"),
    [
        ({"tune_epochs": 2}, False, "--tune-epochs 2 has no effect without --tune halves or --tune block"),
        ({"tune": "none", "tune_lr": 0.1}, False, "--tune-lr 0.1 has no effect without --tune"),
        ({"tune": "halves", "tune_epochs": 0}, False, "--tune-epochs 0 is too few; want 1 or more"),
        ({"tune": "block", "tune_lr": 0.0}, False, "--tune-lr 0 is out of range; want above 0, at most 1"),
        ({"tune": "block", "tune_lr": float("nan")}, False, "--tune-lr nan is out of range"),
        ({"effort": "best"}, True, "--effort best needs the traced model"),
        ({"tune": "block"}, True, "--tune block needs the traced model"),
        ({"tune_lr": 0.1}, True, "--tune-lr 0.1 has no effect"),
    ],
)
def test_what_fine_tuning_refuses(flags, onnx, message):
    with pytest.raises(InputError, match=message):
        recipe(onnx=onnx, **flags)


INT4 = Storage("int4", 128)


def test_the_effort_says_how_weights_are_quantised():
    for effort, method in {"fast": "rtn", "balanced": "sweep", "best": "joint"}.items():
        assert recipe(effort=effort, storage=INT4).quantise == Quantise(INT4, method)
    assert recipe(effort="best", distil=0, storage=INT4).quantise == Quantise(INT4, "sweep")  # nothing to learn with
    assert recipe(storage=INT4, quantise="rtn") == replace(recipe(), quantise=Quantise(INT4, "rtn"))
    assert recipe(effort="fast", tune="halves", storage=INT4, quantise="joint").quantise == Quantise(INT4, "joint")
    by_row = recipe(pattern=HALF, allocate="besa-row", storage=INT4, quantise="joint")
    assert by_row.quantise == Quantise(INT4, "joint")
    assert recipe(onnx=True, storage=INT4).quantise is None  # packing rounds to nearest
    assert recipe(onnx=True, storage=INT4, quantise="rtn").quantise is None


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"quantise": "rtn"}, "--quantise rtn has no effect without --dtype int8 or --dtype int4"),
        ({"quantise": "sweep", "storage": Storage("bf16")}, "--quantise sweep has no effect without --dtype int8"),
        (
            {"quantise": "joint", "storage": INT4},
            "--quantise joint learns with --tune, --distil or --allocate; give one",
        ),
        ({"quantise": "sweep", "storage": INT4, "onnx": True}, "--quantise sweep goes by what the linears of an .onnx"),
        (
            {"quantise": "joint", "storage": INT4, "onnx": True, "inputs": True},
            "--quantise joint needs the traced model",
        ),
    ],
)
def test_quantisers_that_are_refused(flags, why):
    with pytest.raises(InputError, match=why):
        recipe(**flags)
