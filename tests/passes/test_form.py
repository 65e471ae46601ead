"""What forms weigh, which of them cannot hurt more than others, and what they make of a weight."""

import itertools

import pytest
import torch
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.dialect.packed import pack
from sparsify_export.passes.dialect.storage import FP32, Storage
from sparsify_export.passes.form import Form

PATTERNS = [NM(2, 4), NM(4, 8), NM(6, 8), NM(8, 16), Unstructured(0.3), Unstructured(0.5), Unstructured(0.9)]
STORAGES = [FP32, Storage("bf16"), Storage("int8"), Storage("int4", 32)]
CODED = [Form(None, Storage("int8", blocked=True)), *(Form(None, Storage("int4", g, blocked=True)) for g in (32, 128))]
FORMS = [Form(), *CODED, *(Form(pattern, storage) for pattern in PATTERNS for storage in STORAGES)]
WEIGHT = torch.randn(48, 192, generator=torch.Generator().manual_seed(0))
NORM = torch.rand(192, generator=torch.Generator().manual_seed(1)) + 0.1


def error(form):
    return float(((form.applied(WEIGHT, NORM) - WEIGHT) * NORM).square().sum())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bytes_are_those_of_the_packed_weight(form):
    if form.dense:
        assert form.nbytes(48, 192) == WEIGHT.nbytes
        return
    stored = pack(form.applied(WEIGHT, NORM), form.pattern, form.storage)
    assert stored.nbytes <= form.nbytes(48, 192) <= stored.nbytes * 1.05
    assert torch.allclose(stored.unpack(), form.applied(WEIGHT, NORM), atol=1e-5)


def test_what_cannot_hurt_more_does_not():
    """The error that Wanda's mask is the least of, over all pairs of forms; rounding may add a little to it."""
    for one, other in itertools.permutations(FORMS, 2):
        if one.cannot_hurt_more(other):
            assert error(one) <= error(other) * 1.02 + 1e-9, (one, other)
    assert Form(NM(4, 8)).cannot_hurt_more(Form(NM(2, 4)))
    assert not Form(NM(2, 4)).cannot_hurt_more(Form(NM(4, 8)))
    assert not Form(NM(2, 4)).cannot_hurt_more(Form(Unstructured(0.5)))
    assert not Form(NM(2, 4), Storage("int4", 32)).cannot_hurt_more(Form(NM(2, 4), Storage("int8")))


def test_what_nothing_runs_is_refused():
    with pytest.raises(ValueError, match="cannot be stored"):
        Form(None, Storage("bf16"))
    with pytest.raises(ValueError, match="cannot be stored"):
        Form(NM(2, 4), Storage("int8", blocked=True))
    with pytest.raises(ValueError, match="only codes"):
        Storage("bf16", blocked=True)
