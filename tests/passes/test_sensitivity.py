"""The damage estimated against the loss that changing one linear alone really costs, and against its definition."""

from dataclasses import replace

import pytest
import scipy.stats
import torch
from families import VOCABULARY, partitioned, random_model
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.form import Form
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.sensitivity import witness
from sparsify_export.runtime.published import put_weights

PRUNED = Form(NM(2, 4))
FORMS = [PRUNED, Form(Unstructured(0.8)), Form(NM(6, 8)), Form(None, Storage("int4", 32, blocked=True))]


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


def damage(parts, params, batches, forms=(PRUNED,), *, output="logits", seed=0):
    """Of every linear in every form, activations not rounded, by path."""
    seen = witness(parts, params, batches, output=output, seed=seed)
    found = {}
    for place, part in enumerate(parts.blocks):
        for linear in part.linears:
            weight, site = params[linear.weight], (place, linear.node)
            changed = [(form.applied(weight, seen.norm([site])), lambda x: x) for form in forms]
            found[linear.path] = seen.damage(site, weight, changed)
    return found


def kl(model, ids, dense):
    """Of the published model, in nats a token."""
    with torch.no_grad():
        now = model(input_ids=ids).logits.log_softmax(-1)
    return float((dense.exp() * (dense - now)).sum(-1).mean())


def test_the_order_of_damage_is_that_of_the_models_own_loss(llama):
    """Over linears and forms: a mask, and what it costs, are made here by the published model's own hooks."""
    model, parts, batch = llama
    params = weights(model)
    found = damage(parts, params, [batch], FORMS)
    linears = [linear for part in parts.blocks for linear in part.linears]
    assert list(found) == [linear.path for linear in linears]
    with torch.no_grad():
        dense = model(input_ids=batch.inputs[0]).logits.log_softmax(-1)
    true = {}
    for linear in linears:
        name, norms = linear.weight, {}
        module = model.get_submodule(name.removeprefix("model.").removesuffix(".weight"))
        hook = module.register_forward_pre_hook(lambda _, x, norms=norms: norms.update(x=x[0].flatten(0, 1)))
        kl(model, batch.inputs[0], dense)
        hook.remove()
        true[linear.path] = []
        for form in FORMS:
            put_weights(model, {name: form.applied(params[name], norms["x"].norm(dim=0))}, {})
            true[linear.path].append(kl(model, batch.inputs[0], dense))
        put_weights(model, {name: params[name]}, {})
    for place in range(len(FORMS)):
        own = [[its[path][place] for path in true] for its in (found, true)]
        assert scipy.stats.spearmanr(*own).statistic > 0.8, FORMS[place]
        assert 0.5 < sum(own[0]) / sum(own[1]) < 2, FORMS[place]
    together = [[x for path in true for x in its[path]] for its in (found, true)]
    assert scipy.stats.spearmanr(*together).statistic > 0.9


def test_rounded_activations_are_part_of_the_damage(llama):
    model, parts, batch = llama
    params = weights(model)
    seen = witness(parts, params, [batch], output="logits")
    linear = parts.blocks[0].linears[0]
    weight, storage = params[linear.weight], Storage("int8")
    exact, rounded, coarse = seen.damage(
        (0, linear.node), weight, [(weight, lambda x: x), (weight, storage.activations), (weight, lambda x: x.sign())]
    )
    assert exact == 0 < rounded < coarse


def test_the_seed_changes_the_estimate_and_nothing_else_does(llama):
    model, parts, batch = llama
    one, again, other = (damage(parts, weights(model), [batch], seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert all(one[path] != other[path] for path in one)


def test_padding_changes_nothing(llama):
    model, parts, batch = llama
    params = weights(model)
    ids = batch.inputs[0][:3]
    plain = Batch((ids, torch.ones_like(ids), *(x[:3] for x in batch.inputs[2:])), torch.ones_like(ids).bool(), 4)
    front = torch.zeros(3, 5, dtype=torch.int64)
    mask = torch.cat([front, torch.ones_like(ids)], dim=1)
    padded = Batch((torch.cat([front, ids], dim=1), mask, *plain.inputs[2:]), mask.bool(), 4)
    one, other = (damage(parts, params, [each]) for each in (plain, padded))
    assert one.keys() == other.keys()
    for path in one:
        assert other[path] == pytest.approx(one[path], rel=1e-3)


def test_values_are_measured_by_their_own_error():
    model, parts = random_model("bert"), partitioned("bert")
    ids = torch.randint(0, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    given = tuple(inputs.values())[: len(parts.inputs)]
    found = damage(parts, weights(model), [Batch(given, torch.ones_like(ids).bool())], output="values")
    assert len(found) == 12
    assert all(0 < x < 1 for (x,) in found.values())


def test_texts_without_a_token_that_counts_are_refused(llama):
    model, parts, batch = llama
    with pytest.raises(InputError, match="no token"):
        witness(parts, weights(model), [replace(batch, token_mask=torch.zeros(16, 24).bool())], output="logits")
