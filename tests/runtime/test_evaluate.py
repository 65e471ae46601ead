"""Perplexity against numbers worked out by hand, and the same from torch and ONNX."""

import math

import pytest
import torch
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime.evaluate import onnx_logits, perplexity, torch_logits
from sparsify_export.runtime.session import CausalSession, open_session


def test_by_hand():
    # One prediction a window; p = 1/2 for the first, 1/8 for the second: exp((ln 2 + ln 8) / 2) = sqrt(16).
    table = torch.tensor([[0.5, 0.5, 0.0], [0.125, 0.375, 0.5]]).log()
    result = perplexity(lambda ids: table[ids], torch.tensor([[0, 1], [1, 0]]))
    assert result.perplexity == pytest.approx(4.0)
    assert result.mean_nll == pytest.approx(math.log(4))
    assert (result.tokens, result.windows, result.window) == (2, 2, 2)


@pytest.mark.parametrize(("windows", "length"), [(1, 2), (3, 17), (2, 300)])
def test_knowing_nothing_is_worth_the_vocabulary(windows, length):
    result = perplexity(lambda ids: torch.zeros(*ids.shape, 50), torch.zeros(windows, length, dtype=torch.long))
    assert result.perplexity == pytest.approx(50, rel=1e-6)
    assert result.tokens == windows * (length - 1)


def test_matches_cross_entropy_on_long_windows():
    torch.manual_seed(0)
    windows = torch.randint(40, (2, 291))  # 290 predictions: two chunks of 128 and a rest
    logits = torch.randn(2, 291, 40) * 5
    rows = iter(logits)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten())
    assert perplexity(lambda ids: next(rows)[None], windows).mean_nll == pytest.approx(expected.item(), rel=1e-6)


def test_a_shift_of_the_logits_changes_nothing_and_nothing_overflows():
    logits = torch.randn(1, 9, 11)
    ids = torch.randint(11, (1, 9))
    assert perplexity(lambda _: logits + 1000, ids).mean_nll == pytest.approx(
        perplexity(lambda _: logits, ids).mean_nll, rel=1e-4
    )
    certain = torch.full((1, 9, 11), -2e4).scatter(2, (ids[..., None] + 1) % 11, 0.0)
    assert perplexity(lambda _: certain, torch.zeros(1, 9, dtype=torch.long)).perplexity == math.inf


def test_torch_and_onnx_agree(tiny):
    windows = torch.randint(23, (3, 12), generator=torch.Generator().manual_seed(1))
    seen = []
    ours = perplexity(
        onnx_logits(CausalSession(open_session(tiny.path, threads=1))), windows, progress=lambda *a: seen.append(a)
    )
    theirs = perplexity(torch_logits(tiny.model), windows)
    assert ours.mean_nll == pytest.approx(theirs.mean_nll, rel=1e-5)
    assert seen == [("evaluating", 1, 3), ("evaluating", 2, 3), ("evaluating", 3, 3)]


@pytest.mark.parametrize("shape", [(0, 8), (4, 1), (4, 0)])
def test_refuses_nothing_to_predict(shape):
    with pytest.raises(InputError, match=f"at least one window of 2 or more tokens, got {shape[0]} of {shape[1]}"):
        perplexity(lambda ids: torch.zeros(*ids.shape, 5), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_names_the_window_with_a_nan(bad):
    calls = []

    def logits(ids):
        calls.append(1)
        out = torch.zeros(*ids.shape, 5)
        out[0, 2, 1] = bad if len(calls) == 2 else 0.0
        return out

    with pytest.raises(InputError, match="not finite in window 2 of 3"):
        perplexity(logits, torch.zeros(3, 8, dtype=torch.long))
