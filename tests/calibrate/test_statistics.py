import pytest
import reference
import torch
from sparsify_export.calibrate import statistics
from sparsify_export.calibrate.statistics import ActNorm


def test_norm_is_neither_squared_nor_a_mean():
    norm = ActNorm(2)
    norm.update(torch.tensor([[[3.0, 0.0], [4.0, 1.0]]]))
    assert norm.norm().tolist() == [5.0, 1.0]
    assert norm.norm().dtype == torch.float32
    assert norm.tokens == 2


def test_batches_add_up_to_the_norm_over_all_tokens(monkeypatch):
    monkeypatch.setattr(statistics, "_CHUNK", 15)  # three rows at a time
    x = torch.randn(7, 3, 5)
    norm = ActNorm(5)
    for batch in x.split(2):
        norm.update(batch)
    assert norm.tokens == 21
    assert norm.norm().tolist() == pytest.approx(reference.norms(x.reshape(-1, 5)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_squared_in_float32(dtype):
    x = (torch.randn(64, 4) * 300).to(dtype)  # squares beyond 65504
    norm = ActNorm(4)
    norm.update(x)
    assert norm.norm().tolist() == pytest.approx(reference.norms(x), rel=1e-6)


def test_small_squares_are_not_lost_behind_large_ones():
    norm = ActNorm(1)
    norm.update(torch.full((1, 1), 1e4))
    for _ in range(64):
        norm.update(torch.ones(1000, 1))
    assert norm.norm().item() == pytest.approx((1e8 + 64000) ** 0.5, rel=1e-7)


def test_squares_that_overflow_float32_are_not_taken_for_infinity():
    norm = ActNorm(1)
    norm.update(torch.tensor([[3e30], [4e30]]))
    assert norm.norm().item() == pytest.approx(5e30)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_masked_tokens_do_not_count_whatever_they_hold(dtype):
    x = torch.tensor([[[3.0], [float("nan")]], [[4.0], [float("inf")]]])
    norm = ActNorm(1)
    norm.update(x, torch.tensor([[1, 0], [1, 0]]).to(dtype))
    assert norm.norm().tolist() == [5.0]
    assert norm.tokens == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_nan_and_infinity_and_counts_nothing(bad):
    norm = ActNorm(3)
    norm.update(torch.ones(4, 3))
    with pytest.raises(ValueError, match="activations hold NaN or infinity in 1 of 3 input features"):
        norm.update(torch.tensor([[1.0, bad, 1.0], [1.0, 1.0, 1.0]]))
    assert norm.tokens == 4
    assert norm.norm().tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("token_mask", [None, torch.zeros(2, 3)])
def test_no_tokens_is_an_error(token_mask):
    norm = ActNorm(4)
    if token_mask is not None:
        norm.update(torch.ones(2, 3, 4), token_mask)
    with pytest.raises(ValueError, match="no calibration token reached this layer"):
        norm.norm()


def test_an_empty_batch_changes_nothing():
    norm = ActNorm(2)
    norm.update(torch.ones(1, 2))
    norm.update(torch.ones(0, 5, 2))
    assert norm.tokens == 1


def test_accepts_one_token_strided_inputs_and_gradients():
    norm = ActNorm(2)
    norm.update(torch.ones(2))
    norm.update(torch.ones(2, 3, requires_grad=True).T)
    assert norm.tokens == 4
    assert norm.norm().tolist() == [2.0, 2.0]
    assert not norm.norm().requires_grad


@pytest.mark.parametrize("shape", [(), (3, 5)])
def test_refuses_the_wrong_number_of_features(shape):
    with pytest.raises(ValueError, match="x wants 4 features on its last axis, got shape"):
        ActNorm(4).update(torch.ones(shape))


def test_refuses_a_mask_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"token_mask wants shape \(2, 3\), got \(3, 2\)"):
        ActNorm(4).update(torch.ones(2, 3, 4), torch.ones(3, 2))
