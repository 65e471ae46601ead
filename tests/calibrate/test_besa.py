import pytest
import torch
from sparsify_export.calibrate.besa import output_loss, rate_loss


def test_output_loss_by_hand():
    wanted = torch.tensor([[[3.0, 0.0], [4.0, 0.0]]])
    got = torch.tensor([[[3.0, 1.0], [9.0, 2.0]]])
    # channel 0: 25 / 25; channel 1 is always zero, so its error counts as it is: 1 + 4
    assert output_loss(got, wanted).item() == pytest.approx((1 + 5) / 2)
    assert output_loss(wanted, wanted).item() == 0


def test_padding_does_not_count():
    wanted, got = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[False, True, True], [True, True, True]])
    got[0, 0], wanted[0, 0] = 1e3, -1e3
    torch.testing.assert_close(output_loss(got, wanted, mask), output_loss(got[mask], wanted[mask]))


def test_channels_count_by_their_own_size():
    wanted, got = torch.randn(5, 3), torch.randn(5, 3)
    scale = torch.tensor([1.0, 100.0, 0.01])
    torch.testing.assert_close(output_loss(got * scale, wanted * scale), output_loss(got, wanted))


def test_rate_loss_is_relative_to_the_target():
    assert rate_loss(torch.tensor(0.45), 0.5).item() == pytest.approx(0.01)
    assert rate_loss(torch.tensor(0.9), 0.9).item() == 0
