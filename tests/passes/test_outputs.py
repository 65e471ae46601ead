"""What of an output counts: pooling and losses against plain Python and other people's functions."""

import math

import numpy as np
import pytest
import torch
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.outputs import (
    SIMILARITY,
    STATES,
    TEMPERATURE,
    Pooled,
    errors,
    pool,
    rows_of,
    size_of,
    target_of,
)
from sparsify_export.runtime import embedding

MODES = ("mean", "cls", "max", "lasttoken")


def states(texts=4, tokens=7, size=5):
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(texts, tokens, dtype=torch.bool)
    mask[1, 4:] = False
    mask[2, :3] = False  # padded in front
    return torch.randn(texts, tokens, size, generator=generator), mask


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_pooling_is_that_of_plain_loops_and_of_evaluation(mode, normalise):
    hidden, mask = states()
    found = pool(hidden, mask, Pooled(mode, normalise))
    for text in range(len(hidden)):
        own = [hidden[text, place].tolist() for place in range(7) if mask[text, place]]
        columns = list(zip(*own, strict=True))
        made = {
            "mean": [sum(column) / len(own) for column in columns],
            "cls": own[0],
            "max": [max(column) for column in columns],
            "lasttoken": own[-1],
        }[mode]
        length = math.sqrt(sum(x * x for x in made)) if normalise else 1.0
        assert found[text].tolist() == pytest.approx([x / length for x in made], rel=1e-5)
    evaluated = embedding.pool(hidden.numpy(), mask.long().numpy(), embedding.Pooling(mode, normalise))
    np.testing.assert_allclose(found.numpy(), evaluated, rtol=1e-5)


def test_a_vector_of_zeros_stays_one():
    assert pool(torch.zeros(1, 2, 3), None, Pooled()).tolist() == [[0, 0, 0]]


def test_rows_are_tokens_that_count_or_samples():
    hidden, mask = states()
    batch = Batch((torch.zeros(4, 7, dtype=torch.long),), mask)
    assert torch.equal(rows_of("values", hidden, batch), torch.cat([h[m] for h, m in zip(hidden, mask, strict=True)]))
    assert torch.equal(rows_of("classes", hidden[:, 0], batch), hidden[:, 0])  # classes, whatever the padding
    assert torch.equal(rows_of(Pooled(), hidden, batch), torch.where(mask[..., None], hidden, 0.0))
    whole = Batch((torch.zeros(4, 7, dtype=torch.long),), None)
    assert torch.equal(rows_of("values", hidden, whole), hidden.reshape(28, 5))


WHOLE = Batch((), None)


def pair(rows=6, size=5):
    generator = torch.Generator().manual_seed(9)
    wanted = torch.randn(rows, size, generator=generator)
    return wanted, wanted + 0.3 * torch.randn(rows, size, generator=generator)


@pytest.mark.parametrize("output", ["logits", "classes"])
def test_divergence_of_tokens_and_classes_is_torchs(output):
    wanted, found = pair()
    loss = errors(output, found, target_of(output, wanted), WHOLE).sum()
    ours = torch.nn.functional.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum")
    assert float(loss) == pytest.approx(float(ours), rel=1e-5)
    assert size_of(output, wanted) == 6


def test_divergence_of_labels_by_hand():
    wanted, found = pair(2, 3)
    by_hand = 0.0
    for z, y in zip(wanted.flatten().tolist(), found.flatten().tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-z)), 1 / (1 + math.exp(-y))
        by_hand += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(errors("labels", found, target_of("labels", wanted), WHOLE).sum()) == pytest.approx(by_hand, rel=1e-4)


def test_values_are_compared_with_their_energy():
    wanted, found = pair()
    loss = float(errors("values", found, wanted, WHOLE).sum()) / size_of("values", wanted)
    assert loss == pytest.approx(float(((found - wanted) ** 2).sum() / (wanted**2).sum()), rel=1e-5)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def relative(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / sum(y * y for y in b)


@pytest.mark.parametrize("normalise", [False, True])
def test_embeddings_by_cosine_and_likeness_to_each_other_and_states(normalise):
    """Text by text, without padding, in plain Python."""
    dense, mask = states()
    sparse = dense + 0.3 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(9))
    own = [
        [[h[text][place].tolist() for place in range(7) if mask[text, place]] for text in range(4)]
        for h in (sparse, dense)
    ]
    e, d = ([[sum(column) / len(text) for column in zip(*text, strict=True)] for text in texts] for texts in own)
    by_hand = 0.0
    for i in range(4):
        by_hand += 2 * (1 - cosine(e[i], d[i])) if normalise else relative(e[i], d[i])
        by_hand += STATES * relative(*([x for state in h[i] for x in state] for h in own))
        others = [j for j in range(4) if j != i]
        p = [math.exp(cosine(d[i], d[j]) / TEMPERATURE) for j in others]
        q = [math.exp(cosine(e[i], e[j]) / TEMPERATURE) for j in others]
        for a, b in zip(p, q, strict=True):
            by_hand += SIMILARITY * a / sum(p) * math.log((a / sum(p)) / (b / sum(q)))
    batch, output = Batch((), mask), Pooled("mean", normalise)
    rows, target = (rows_of(output, h, batch) for h in (sparse, dense))
    assert float(errors(output, rows, target, batch).sum()) == pytest.approx(by_hand, rel=1e-3)
    assert size_of(output, target) == 4


@pytest.mark.parametrize("texts", [1, 2])
def test_one_text_or_two_have_nobody_to_be_like(texts):
    dense, _ = states(texts + 2)
    assert errors(Pooled(), dense[:texts], dense[1 : texts + 1], WHOLE).shape == (texts, 2)
