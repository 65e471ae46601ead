"""Greedy text with the cache, against torch without one."""

import math

import numpy as np
import pytest
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime.generate import generate, greedy_torch
from sparsify_export.runtime.session import CausalSession, open_session


@pytest.fixture(scope="module")
def causal(tiny):
    return CausalSession(open_session(tiny.path, threads=1))


@pytest.mark.parametrize("prompts", [[[4]], [[1, 2, 3, 4]], [[5, 6, 7], [8]], [[9, 9], [1, 2, 3, 4, 5], [22]]])
def test_equals_torch_without_a_cache(tiny, causal, prompts):
    result = generate(causal, prompts, max_new_tokens=24)
    assert result.tokens == greedy_torch(tiny.model, prompts, max_new_tokens=24)
    assert result.prompt_tokens == sum(map(len, prompts))
    assert result.decoded_tokens == 23 * len(prompts)


def test_every_row_stops_at_its_own_end(tiny, causal):
    prompts = [[5, 6, 7], [8], [13, 2]]
    free = greedy_torch(tiny.model, prompts, max_new_tokens=12)
    eos = {free[0][3]}
    expected = greedy_torch(tiny.model, prompts, max_new_tokens=12, eos=eos)
    result = generate(causal, prompts, max_new_tokens=12, eos=eos)
    assert result.tokens == expected
    assert expected[0][-1] in eos
    assert len(expected[0]) <= 4
    assert result.decoded_tokens == sum(map(len, expected)) - 3


def test_rates(causal):
    one = generate(causal, [[1, 2]], max_new_tokens=1)
    assert (len(one.tokens[0]), one.decoded_tokens, one.decode_rate) == (1, 0, 0.0)
    assert one.prefill_rate > 0
    assert generate(causal, [[1, 2]], max_new_tokens=3).decode_rate > 0
    assert generate(causal, [[1, 2]], max_new_tokens=0).tokens == ((),)


@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        ([], "a prompt is empty"),
        ([[1], []], "a prompt is empty"),
        ([[1, 23]], "holds token 23; the model knows 0 to 22"),
        ([[-1]], "holds token -1"),
    ],
)
def test_refuses(causal, prompts, why):
    with pytest.raises(InputError, match=why):
        generate(causal, prompts, max_new_tokens=4)


def test_refuses_nan(causal, monkeypatch):
    monkeypatch.setattr(causal, "step", lambda ids, mask, past: (np.full((1, 1, 23), math.nan, np.float32), past))
    with pytest.raises(InputError, match="logits are not finite"):
        generate(causal, [[1]], max_new_tokens=4)
