"""The second moment of a linear's input."""

import pytest
import reference
import torch
from sparsify_export.calibrate.hessian import Hessian
from sparsify_export.calibrate.statistics import ActNorm

X = torch.randn(2, 1500, 13, generator=torch.Generator().manual_seed(2))


def of(*batches, masks=None):
    found = Hessian(batches[0].shape[-1])
    for i, x in enumerate(batches):
        found.update(x, None if masks is None else masks[i])
    return found


def test_by_hand():
    found = of(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 2.0]])).matrix()
    assert torch.equal(found, torch.tensor([[10.0, 2.0], [2.0, 8.0]]) * (2 / 3))


def test_against_the_loop_with_several_chunks_and_panels(monkeypatch):
    monkeypatch.setattr("sparsify_export.calibrate.hessian._PANEL", 5)
    found = of(X[0, :700], X.flatten(0, 1)[700:]).matrix()
    torch.testing.assert_close(found.double(), reference.hessian(X.flatten(0, 1)), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.mT)


def test_the_diagonal_has_the_norms():
    norms = ActNorm(13)
    norms.update(X)
    torch.testing.assert_close(of(X).norm(), norms.norm(), rtol=1e-6, atol=0)


def test_masked_tokens_do_not_count_whatever_they_hold():
    mask = torch.rand(X.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.5
    spoiled = X.masked_fill(~mask[..., None], float("nan"))
    assert torch.equal(of(spoiled, masks=[mask]).matrix(), of(X[mask]).matrix())


def test_the_number_of_threads_decides_nothing():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(of(X).matrix())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize(
    ("x", "mask", "why"),
    [
        (torch.tensor([[1.0, float("nan")]]), None, "activations hold NaN or infinity in 1 of 2 input features"),
        (torch.tensor([[1e30, 1.0]]), None, "NaN or infinity in 1 of 2"),
        (torch.ones(3, 4), None, r"x wants 2 features on its last axis, got shape \(3, 4\)"),
        (torch.ones(3, 2), torch.ones(2), r"token_mask wants shape \(3,\), got \(2,\)"),
    ],
)
def test_refuses(x, mask, why):
    with pytest.raises(ValueError, match=why):
        Hessian(2).update(x, mask)


def test_refuses_to_tell_without_a_token():
    empty = of(torch.ones(1, 2), masks=[torch.zeros(1)])
    for ask in (empty.matrix, empty.norm):
        with pytest.raises(ValueError, match="no calibration token reached this layer"):
            ask()
