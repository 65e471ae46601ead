"""Products through oneDNN: as right as torch's own, differentiable, and the same for any number of threads."""

import pytest
import torch
from sparsify_export.calibrate import matmul
from sparsify_export.passes.equivalence import compare

SHAPES = [((1, 8), 4), ((3, 5, 8), 16), ((2, 0, 8), 4), ((7, 13), 1), ((64, 300), 200), ((9, 1), 3)]


def made(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_equals_torch_in_value_and_in_every_gradient(shape, out, bias):
    leaves = [made(*shape), made(out, shape[-1]), *([made(out)] if bias else [])]
    grad = made(*shape[:-1], out)

    def run(function, dtype):
        own = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
        y = function(*own)
        y.backward(grad.to(dtype))
        return [y, *(leaf.grad for leaf in own)]

    found = run(matmul.linear, torch.float32)
    plain, exact = (run(torch.nn.functional.linear, dtype) for dtype in (torch.float32, torch.float64))
    for got, baseline, truth in zip(found, plain, exact, strict=True):
        close = compare(got, baseline, truth, factor=8.0)
        assert close.ok, close


def test_views_do_as_well_as_copies():
    x, weight = made(6, 5, 8), made(8, 12)
    assert torch.equal(
        matmul.linear(x.transpose(0, 1), weight.mT), matmul.linear(x.transpose(0, 1).contiguous(), weight.mT.clone())
    )
    a, b = made(6, 8), made(8, 12)
    assert torch.equal(matmul.product(a, b), matmul.linear(a, b.mT))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype):
    x, weight, bias = made(4, 8, dtype=dtype), made(3, 8, dtype=dtype), made(3, dtype=dtype)
    assert torch.equal(matmul.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def test_a_torch_without_the_operator_does_it_itself(monkeypatch):
    monkeypatch.setattr(matmul, "_FAST", False)
    x, weight = made(4, 8), made(3, 8)
    assert torch.equal(matmul.linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize(("tokens", "k", "out"), [(4096, 64, 32), (1, 576, 576), (33, 1536, 64), (64, 1024, 64)])
def test_the_number_of_threads_decides_nothing(tokens, k, out):
    x, weight, threads = made(tokens, k), made(out, k), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(matmul.linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
