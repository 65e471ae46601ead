import reference
import torch
from sparsify_export.calibrate.prodigy import Prodigy


def quadratic(x):
    return ((x - 3) ** 2 * torch.tensor([1.0, 5.0])).sum()


def test_matches_the_loop():
    x = torch.zeros(2, requires_grad=True)
    optimiser = Prodigy([x], growth=2.0, d0=1e-3)
    slow = reference.Prodigy([0.0, 0.0], growth=2.0, d0=1e-3)
    for _ in range(20):
        optimiser.zero_grad()
        quadratic(x).backward()
        optimiser.step()
        slow.step([2 * (slow.x[0] - 3), 10 * (slow.x[1] - 3)])
        torch.testing.assert_close(x.detach(), torch.tensor(slow.x), rtol=1e-3, atol=1e-5)


def test_needs_no_step_size():
    for scale in (1e-3, 1e3):
        x = torch.zeros(2, requires_grad=True)
        optimiser = Prodigy([x])
        for _ in range(200):
            optimiser.zero_grad()
            (scale * quadratic(x)).backward()
            optimiser.step()
        assert (x - 3).abs().max() < 0.1


def test_without_a_gradient_nothing_moves():
    x = torch.ones(3, requires_grad=True)
    optimiser = Prodigy([x])
    x.grad = torch.zeros(3)
    optimiser.step()
    assert x.tolist() == [1, 1, 1]
