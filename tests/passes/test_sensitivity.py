"""The damage estimated against the loss that pruning one linear alone really costs, and against its definition."""

import pytest
import scipy.stats
import torch
from families import VOCABULARY, partitioned, random_model
from sparsify_export.calibrate.masks import nm_keep_mask
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.sensitivity import sensitivity
from sparsify_export.runtime.published import put_weights

PATTERN = NM(2, 4)


def weights(model):
    """By their key in the program, whose wrapper calls the model ``model``."""
    return {
        f"model.{name}": x.detach()
        for name, x in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    }


@pytest.fixture(scope="module")
def llama():
    """A tiny Llama, its parts, and texts of 24 tokens."""
    ids = torch.randint(0, VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    past = [torch.zeros(16, 2, 0, 16)] * 4
    return random_model("llama"), partitioned("llama"), Batch((ids, mask, *past), mask.bool(), 4)


def kl(model, ids, dense):
    """Of the published model, in nats a token."""
    with torch.no_grad():
        now = model(input_ids=ids).logits.log_softmax(-1)
    return float((dense.exp() * (dense - now)).sum(-1).mean())


def test_the_order_of_damage_is_that_of_the_models_own_loss(llama):
    model, parts, batch = llama
    params = weights(model)
    found = sensitivity(parts, params, [batch], PATTERN, output="logits")
    linears = [linear for part in parts.blocks for linear in part.linears]
    assert list(found) == [linear.path for linear in linears]
    with torch.no_grad():
        dense = model(input_ids=batch.inputs[0]).logits.log_softmax(-1)
    true = {}
    for linear in linears:
        name = linear.weight
        norms = {}
        module = model.get_submodule(name.removeprefix("model.").removesuffix(".weight"))
        hook = module.register_forward_pre_hook(lambda _, x, norms=norms: norms.update(x=x[0].flatten(0, 1)))
        kl(model, batch.inputs[0], dense)
        hook.remove()
        keep = nm_keep_mask(params[name].abs() * norms["x"].norm(dim=0), PATTERN)
        put_weights(model, {name: params[name] * keep}, frozenset())
        true[linear.path] = kl(model, batch.inputs[0], dense)
        put_weights(model, {name: params[name]}, frozenset())
    paths = list(true)
    order = scipy.stats.spearmanr([found[p] for p in paths], [true[p] for p in paths]).statistic
    assert order > 0.8, (found, true)
    assert 0.5 < sum(found.values()) / sum(true.values()) < 2


def test_padding_changes_nothing(llama):
    model, parts, batch = llama
    params = weights(model)
    ids = batch.inputs[0][:3]
    plain = Batch((ids, torch.ones_like(ids), *(x[:3] for x in batch.inputs[2:])), torch.ones_like(ids).bool(), 4)
    front = torch.zeros(3, 5, dtype=torch.int64)
    mask = torch.cat([front, torch.ones_like(ids)], dim=1)
    padded = Batch((torch.cat([front, ids], dim=1), mask, *plain.inputs[2:]), mask.bool(), 4)
    one, other = (sensitivity(parts, params, [each], PATTERN, output="logits") for each in (plain, padded))
    assert one.keys() == other.keys()
    for path in one:
        assert other[path] == pytest.approx(one[path], rel=1e-3)


def test_linears_that_the_pattern_does_not_fit_are_left_out(llama):
    model, parts, batch = llama
    found = sensitivity(parts, weights(model), [batch], NM(2, 24), output="logits")
    assert found == {}


def test_values_are_measured_by_their_own_error():
    model, parts = random_model("bert"), partitioned("bert")
    ids = torch.randint(0, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    given = tuple(inputs.values())[: len(parts.inputs)]
    found = sensitivity(parts, weights(model), [Batch(given, torch.ones_like(ids).bool())], PATTERN, output="values")
    assert len(found) == 12
    assert all(0 < damage < 1 for damage in found.values())
