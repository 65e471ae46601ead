"""BESA's mask against calibrate/ranked.py and against float64 loops, emulated."""

import ctypes

import pytest
import torch
from cuda_emulated import INVALID_VALUE, SUCCESS, Output
from sparsify_export.calibrate import ranked
from sparsify_export.calibrate.rates import staircase
from sparsify_export.passes.equivalence import compare

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(R, C, dtype, count_rows):
    generator = torch.Generator().manual_seed(R + C)
    weight, grad = (torch.randn(R, C, generator=generator).to(dtype) for _ in range(2))
    rank = ranked.ranks(torch.randn(R, C, generator=generator))
    counts = torch.randint(0, C + 1, (count_rows,), generator=generator).int()
    return weight, grad, rank, counts


def forward(kernels, weight, rank, counts):
    out = Output(weight.shape, weight.dtype)
    width = ctypes.c_int32(rank.element_size())
    return kernels.run("rate_mask_forward", weight.dtype, weight, width, rank, counts, len(counts), out, *weight.shape)


def backward(kernels, weight, grad, rank, counts, beta_rows, D):
    """Gradients of the weight and of beta."""
    for_weight, for_beta = Output(weight.shape, weight.dtype), Output((beta_rows, D), torch.float32)
    workspace = torch.empty(len(weight), D) if beta_rows == 1 else None
    return kernels.run(
        "rate_mask_backward", weight.dtype, weight, ctypes.c_int32(rank.element_size()), rank, counts, len(counts),
        grad, for_weight, for_beta, beta_rows, D, workspace, *weight.shape,
    )  # fmt: skip


def beta_gradient(weight, grad, rank, beta_rows, D, dtype=torch.float64):
    """The equation of `ranked.prune`, one candidate at a time."""
    products = -(grad.to(dtype) * weight.to(dtype))
    edges = staircase(weight.shape[1], D - 1)
    rows = torch.stack([torch.where(rank < edge, products, 0.0).sum(dim=1) for edge in edges], dim=1)
    return rows if beta_rows == len(weight) else rows.sum(dim=0, keepdim=True)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 255), (2, 256), (5, 257), (0, 4), (4, 0)])
@pytest.mark.parametrize("each", [True, False])
def test_forward_is_the_mask_of_ranked(kernels, dtype, shape, each):
    weight, _, rank, counts = problem(*shape, dtype, shape[0] if each else 1)
    wanted = ranked.prune(weight, rank, torch.ones(1, 2), counts)
    assert torch.equal(forward(kernels, weight, rank, counts), wanted)


@pytest.mark.parametrize("count", [0, 40])
def test_all_kept_and_all_pruned(kernels, count):
    weight, _, rank, _ = problem(3, 40, torch.float32, 1)
    weight[1, 7] = float("nan")
    got = forward(kernels, weight, rank, torch.tensor([count], dtype=torch.int32))
    assert torch.equal(got.view(torch.int32), (weight if count == 0 else torch.zeros(3, 40)).view(torch.int32))


@pytest.mark.parametrize(
    ("dtype", "R", "C", "D", "each"),
    [
        *((dtype, 3, 40, 101, True) for dtype in TYPES),
        *((dtype, 4, 300, 11, False) for dtype in TYPES),
        (torch.float32, 1, 1, 2, True),
        (torch.float32, 2, 64, 256, False),
        (torch.float32, 2, 64, 257, True),
        (torch.float16, 1, 600, 513, True),
    ],
)
def test_backward_is_the_gradient_of_ranked(kernels, dtype, R, C, D, each):
    beta_rows = R if each else 1
    weight, grad, rank, counts = problem(R, C, dtype, R)
    for_weight, for_beta = backward(kernels, weight, grad, rank, counts, beta_rows, D)
    assert torch.equal(for_weight, torch.where(ranked.keep_mask(rank, counts), grad, 0.0))
    plain = beta_gradient(weight, grad, rank, beta_rows, D, torch.float32)
    closeness = compare(for_beta, plain, beta_gradient(weight, grad, rank, beta_rows, D), factor=4.0)
    assert closeness.ok, str(closeness)


def test_backward_agrees_with_autograd(kernels):
    weight, grad, rank, counts = problem(4, 96, torch.float32, 4)
    beta = torch.full((4, 101), 1 / 101, requires_grad=True)
    wanted = weight.clone().requires_grad_()
    ranked.prune(wanted, rank, beta, counts).backward(grad)
    for_weight, for_beta = backward(kernels, weight, grad, rank, counts, 4, 101)
    assert torch.equal(for_weight, wanted.grad)
    exact = beta_gradient(weight, grad, rank, 4, 101)
    closeness = compare(for_beta, beta.grad, exact, factor=4.0)
    assert closeness.ok, str(closeness)


@pytest.mark.parametrize("C", [8192, 8193, 33000])
def test_rows_longer_than_the_window_and_wide_ranks(kernels, C):
    weight, grad, rank, counts = problem(2, C, torch.float32, 1)
    assert rank.dtype == (torch.int16 if C <= 32767 else torch.int32)
    _, for_beta = backward(kernels, weight, grad, rank, counts, 2, 101)
    plain = beta_gradient(weight, grad, rank, 2, 101, torch.float32)
    closeness = compare(for_beta, plain, beta_gradient(weight, grad, rank, 2, 101), factor=4.0)
    assert closeness.ok, str(closeness)


def test_one_gradient_without_the_other(kernels):
    weight, grad, rank, counts = problem(3, 40, torch.float32, 3)
    head = (torch.float32, weight, ctypes.c_int32(2), rank, counts, 3, grad)
    out = Output((3, 40), torch.float32)
    for_weight = kernels.run("rate_mask_backward", *head, out, None, 0, 0, None, 3, 40)
    out = Output((3, 11), torch.float32)
    for_beta = kernels.run("rate_mask_backward", *head, None, out, 3, 11, None, 3, 40)
    both = backward(kernels, weight, grad, rank, counts, 3, 11)
    assert torch.equal(for_weight, both[0])
    assert torch.equal(for_beta, both[1])


def test_a_weight_without_rows_has_the_gradient_zero(kernels):
    empty = torch.empty(0, 8)
    out = Output((1, 5), torch.float32)
    rank, counts = torch.empty(0, 8, dtype=torch.int16), torch.zeros(1, dtype=torch.int32)
    head = (torch.float32, empty, ctypes.c_int32(2), rank, counts, 1, empty)
    got = kernels.run("rate_mask_backward", *head, None, out, 1, 5, None, 0, 8)
    assert (got == 0).all()


@pytest.mark.parametrize(
    ("width", "count_rows", "beta_rows", "D", "status"),
    [
        (2, 3, 3, 2, SUCCESS),
        (1, 3, 3, 2, INVALID_VALUE),
        (2, 2, 3, 2, INVALID_VALUE),
        (2, 3, 2, 2, INVALID_VALUE),
        (2, 3, 3, 1, INVALID_VALUE),
        (2, 3, 1, 2, INVALID_VALUE),  # wants a workspace
    ],
)
def test_sizes(kernels, width, count_rows, beta_rows, D, status):
    weight, grad, rank, counts = problem(3, 8, torch.float32, 3)
    out = torch.empty(3, D)
    arguments = (torch.float32, weight, ctypes.c_int32(width), rank, counts, count_rows, grad, None, out, beta_rows, D)
    assert kernels.call("rate_mask_backward", *arguments, None, 3, 8) == status
