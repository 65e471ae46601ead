import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsify_export.calibrate import ranked, sums
from sparsify_export.calibrate.masks import fraction_keep_mask
from sparsify_export.calibrate.ranked import keep_mask, prune, ranks
from sparsify_export.calibrate.rates import distribution, mean_rate
from torch.autograd.graph import saved_tensors_hooks


@pytest.fixture
def small_blocks(monkeypatch):
    """Make blocks of 7 elements, so that small matrices take many."""
    monkeypatch.setattr(ranked, "BLOCK", 7)
    monkeypatch.setattr(sums, "BLOCK", 7)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def levels(rows, columns, count, seed):
    """Scores with few levels, hence many ties."""
    return torch.randint(0, count + 1, (rows, columns), generator=generator(seed)).float()


def test_ranks_by_hand():
    assert ranks(torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 0.0]])).tolist() == [[2, 0, 1], [2, 1, 0]]


@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 3), st.integers(0, 2**32))
def test_ranks_match_the_loop_even_with_ties(rows, columns, count, seed):
    score = levels(rows, columns, count, seed)
    assert torch.equal(ranks(score), reference.ranks(score).to(torch.int16))


def test_blocks_do_not_show(small_blocks):
    score = levels(9, 3, 2, seed=3)
    assert torch.equal(ranks(score).long(), reference.ranks(score))


def test_wide_rows_have_wider_ranks():
    assert ranks(torch.rand(1, 32767)).dtype == torch.int16
    wide = ranks(torch.arange(32768.0)[None])
    assert wide.dtype == torch.int32
    assert torch.equal(wide[0], torch.arange(32768, dtype=torch.int32))
    assert not keep_mask(ranks(torch.rand(1, 32767)), torch.tensor([32767])).any()


@given(st.integers(1, 5), st.integers(1, 20), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_equal_counts_are_the_mask_of_an_unstructured_target(rows, columns, sparsity, seed):
    score = levels(rows, columns, 5, seed)
    pruned = torch.tensor([int(sparsity * columns + 0.5)])
    assert torch.equal(keep_mask(ranks(score), pruned), fraction_keep_mask(score, sparsity, "row"))


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**32))
def test_counts_are_exact_and_nested(rows, columns, seed):
    rank = ranks(levels(rows, columns, 3, seed))
    counts = torch.randint(0, columns + 1, (rows,), generator=generator(seed))
    keep = keep_mask(rank, counts)
    assert torch.equal((~keep).sum(dim=1), counts)
    assert (keep | ~keep_mask(rank, (counts + 1).clamp_max(columns))).all()


@settings(max_examples=25)
@given(st.booleans(), st.integers(1, 3), st.integers(1, 7), st.integers(1, 8), st.integers(0, 2**32))
def test_value_and_straight_through_gradient_match_the_slow_reference(by_row, rows, columns, steps, seed):
    weight = torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64).float().requires_grad_()
    rank = ranks(levels(rows, columns, 3, seed))
    logits = torch.randn(rows if by_row else 1, steps + 1, generator=generator(seed)).requires_grad_()
    beta = distribution(logits)
    counts = (mean_rate(beta.detach()) * columns).round().long()
    loss = torch.randn(rows, columns, generator=generator(seed + 1))
    got = prune(weight, rank, beta, counts)
    wanted = reference.straight_through(weight, rank, beta, counts)
    assert torch.equal(got, wanted)
    for a, b in zip(
        torch.autograd.grad((got * loss).sum(), (weight, logits), retain_graph=True),
        torch.autograd.grad((wanted * loss).sum(), (weight, logits)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_by_hand():
    # 4 weights, candidates 0, 1/2, 1: the stair of ranks 0 and 1 is the second candidate, of 2 and 3 the third.
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    beta = torch.tensor([[0.2, 0.5, 0.3]], requires_grad=True)
    rank = torch.tensor([[3, 0, 1, 2]], dtype=torch.int16)
    y = prune(weight, rank, beta, torch.tensor([1]))
    assert y.tolist() == [[1, 0, 3, 4]]
    y.backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert beta.grad.tolist() == [[0, -(20 + 300), -(20 + 300) - (1 + 4000)]]


def test_blocks_do_not_show_in_the_gradient(small_blocks):
    weight, rank = torch.randn(9, 5, generator=generator(0)), ranks(torch.rand(9, 5, generator=generator(1)))
    for groups in (9, 1):
        beta = distribution(torch.randn(groups, 8, generator=generator(2))).requires_grad_()
        counts = torch.full((groups,), 2)
        (got,) = torch.autograd.grad(prune(weight, rank, beta, counts).sum(), beta)
        (wanted,) = torch.autograd.grad(reference.straight_through(weight, rank, beta, counts).sum(), beta)
        torch.testing.assert_close(got, wanted)


def test_learning_costs_at_most_12_bytes_a_weight_beside_the_weight():
    weight, x = torch.randn(64, 512), torch.randn(8, 512, requires_grad=True)
    rank = ranks(weight.abs())
    beta = distribution(torch.zeros(64, 101)).requires_grad_()
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        masked = prune(weight, rank, beta, torch.full((64,), 256))
        loss = torch.nn.functional.linear(x, masked).square().sum()
    del kept[weight.untyped_storage().data_ptr()]
    saved = sum(nbytes for pointer, nbytes in kept.items() if nbytes >= weight.numel())
    assert saved == (2 + 4) * weight.numel()  # ranks and masked weight; the gradient is as large as the weight
    loss.backward()
    assert beta.grad.abs().sum() > 0


def test_edges_prune_nothing_and_everything():
    weight = -torch.rand(3, 4)
    rank = ranks(weight.abs())
    beta = distribution(torch.zeros(1, 11))
    assert torch.equal(prune(weight, rank, beta, torch.tensor([0])), weight)
    gone = prune(weight, rank, beta, torch.tensor([4]))
    assert not gone.any()
    assert not torch.signbit(gone).any()
    assert ranks(torch.zeros(2, 3)).tolist() == [[2, 1, 0]] * 2  # of equals the last goes first


def test_nan_is_refused():
    with pytest.raises(ValueError, match="score holds NaN"):
        ranks(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="score wants shape"):
        ranks(torch.rand(3))


def test_the_number_of_threads_decides_nothing():
    weight = torch.randn(256, 512, generator=generator(0))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            beta = distribution(torch.zeros(1, 101)).requires_grad_()
            rank = ranks(weight.abs())
            (grad,) = torch.autograd.grad(prune(weight, rank, beta, torch.tensor([256])).square().sum(), beta)
            found.append((rank, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
