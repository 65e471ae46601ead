import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsify_export.calibrate.scores import hessian, magnitude, ria, wanda

WEIGHT = torch.tensor([[1.0, -2.0, 0.0], [3.0, 2.0, 5.0]])
NORM = torch.tensor([4.0, 1.0, 9.0])


def test_magnitude_by_hand():
    assert magnitude(WEIGHT).tolist() == [[1, 2, 0], [3, 2, 5]]


def test_wanda_by_hand():
    assert wanda(WEIGHT, NORM).tolist() == [[4, 2, 0], [12, 2, 45]]


def test_ria_by_hand():
    # Columns sum to 4, 4, 5; rows to 3, 10.
    expected = [
        [(1 / 4 + 1 / 3) * 2, (2 / 4 + 2 / 3) * 1, 0],
        [(3 / 4 + 3 / 10) * 2, (2 / 4 + 2 / 10) * 1, (1 + 0.5) * 3],
    ]
    torch.testing.assert_close(ria(WEIGHT, NORM), torch.tensor(expected), rtol=1e-6, atol=0)


@given(st.integers(0, 5), st.integers(1, 6), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**32))
def test_scores_match_the_loops(rows, columns, power, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-2, 3, (rows, columns), generator=generator).float()  # many zeros: dead rows and columns
    norm = torch.rand(columns, generator=generator)
    torch.testing.assert_close(wanda(weight, norm), reference.wanda(weight, norm), rtol=1e-6, atol=0)
    torch.testing.assert_close(ria(weight, norm, power).double(), reference.ria(weight, norm, power), rtol=1e-6, atol=0)


@pytest.mark.parametrize("score", [magnitude, lambda w: wanda(w, NORM), lambda w: ria(w, NORM)])
def test_scores_are_new_float32_tensors_and_leave_the_weight_alone(score):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        weight = WEIGHT.to(dtype)
        assert score(weight).dtype == torch.float32
        assert torch.equal(weight, WEIGHT.to(dtype))


def test_shares_do_not_underflow_in_half_precision():
    weight = torch.rand(512, 512).add(0.5).half()
    assert ria(weight, torch.ones(512)).unique().numel() > 500


def test_a_dead_row_and_a_dead_column_score_zero():
    weight = torch.ones(3, 3)
    weight[1] = 0
    weight[:, 2] = 0
    score = ria(weight, NORM)
    assert score.isfinite().all()
    assert (score == 0).equal(weight == 0)


@pytest.mark.parametrize("score", [wanda, ria])
def test_a_feature_that_is_always_zero_scores_zero(score):
    assert score(WEIGHT, torch.tensor([0.0, 1.0, 1.0]))[:, 0].tolist() == [0, 0]


def test_power_zero_ignores_activations():
    assert torch.equal(ria(WEIGHT, torch.zeros(3), power=0), ria(WEIGHT, NORM, power=0))


def test_tiny_weights_give_finite_shares():
    assert ria(torch.full((2, 2), 1e-44), torch.ones(2)).isfinite().all()


def test_ria_does_not_hang_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    weight, norm = torch.randn(301, 1025, generator=generator), torch.rand(1025, generator=generator)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results += [ria(weight, norm), ria(weight[:1], norm)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[::2])
    assert all(torch.equal(result, results[1]) for result in results[1::2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("score", [magnitude, lambda w: wanda(w, NORM), lambda w: ria(w, NORM)])
def test_refuses_weights_that_are_not_finite(score, bad):
    weight = WEIGHT.clone()
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        score(weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("score", [wanda, ria])
def test_refuses_norms_that_are_none(score, bad):
    with pytest.raises(ValueError, match="act_norm holds a NaN, infinite or negative norm"):
        score(WEIGHT, torch.tensor([1.0, bad, 1.0]))


@pytest.mark.parametrize("norm", [torch.ones(2), torch.ones(1, 3), torch.tensor(1.0)])
def test_refuses_norms_of_the_wrong_shape(norm):
    with pytest.raises(ValueError, match=r"act_norm wants shape \(3,\)"):
        wanda(WEIGHT, norm)


def test_refuses_a_weight_that_is_no_matrix():
    with pytest.raises(ValueError, match=r"weight wants shape \[out_features, in_features\], got \(3,\)"):
        magnitude(torch.ones(3))


@pytest.mark.parametrize("power", [-0.5, float("nan")])
def test_refuses_a_negative_power(power):
    with pytest.raises(ValueError, match="power wants 0 or more"):
        ria(WEIGHT, NORM, power)


def test_hessian_by_hand():
    got = hessian(WEIGHT, torch.tensor([0.5, 1.0, 4.0]))
    torch.testing.assert_close(got, torch.tensor([[2.0, 4.0, 0.0], [18.0, 4.0, 6.25]]))


def test_hessian_is_the_growth_of_the_best_error_without_the_weight():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    matrix, weight = x.T @ x, torch.randn(1, 5, generator=generator, dtype=torch.float64)
    score = hessian(weight, torch.linalg.inv(matrix).diagonal())
    for j in range(5):
        keep = torch.arange(5)[None] != j
        moved = reference.best_weight(weight, matrix, keep) - weight
        assert score[0, j].item() == pytest.approx((moved @ matrix @ moved.T).item(), rel=1e-5)


@pytest.mark.parametrize("diagonal", [[1.0, 0.0, 1.0], [1.0, float("nan"), 1.0], [1.0, 1.0]])
def test_hessian_refuses_a_wrong_diagonal(diagonal):
    with pytest.raises(ValueError, match="inverse_diagonal"):
        hessian(WEIGHT, torch.tensor(diagonal))
