"""From flags to recipes."""

import pytest
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.effort import Flags, effort_of, make_recipe
from sparsify_export.passes.recipe import Recipe

TWO_OF_FOUR = NM(2, 4)


def recipe(onnx=False, pattern=TWO_OF_FOUR, **flags):
    return make_recipe(pattern, Flags(**flags), onnx=onnx)


def test_balanced_is_the_default_and_fast_changes_no_weight():
    assert recipe() == recipe(effort="balanced") == Recipe(TWO_OF_FOUR, update="admm-cg", mask_from="update")
    assert recipe(effort="fast") == Recipe(TWO_OF_FOUR, update="none", mask_from="score")
    assert recipe(pattern=Unstructured(0.5)).update == "admm-cg"


def test_an_onnx_file_is_scored_and_masked():
    assert effort_of(Flags(), onnx=True) == "fast"
    wanted = Recipe(TWO_OF_FOUR, permute="none")
    assert recipe(onnx=True) == recipe(onnx=True, effort="fast") == recipe(onnx=True, update="none") == wanted


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ({"score": "wanda"}, {}),
        ({"permute": "none"}, {}),
        ({"damping": 0.02}, {}),
        ({"skip": ("*.up",)}, {}),
        ({"ria_power": 1.0}, {}),
        ({"mask_from": "score"}, {}),
        ({"update": "sparsegpt"}, {}),
        ({"update": "cg"}, {"mask_from": "score"}),
        ({"update": "none"}, {"mask_from": "score"}),
    ],
)
def test_a_flag_that_is_given_changes_only_itself(flag, changed):
    default = vars(recipe())
    assert vars(recipe(**flag)) == {**default, **flag, **changed}


def test_fast_with_an_update_is_that_update():
    assert recipe(effort="fast", update="admm") == Recipe(TWO_OF_FOUR, update="admm", mask_from="update")
