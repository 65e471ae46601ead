"""Judging a file by the experts that it chose itself, and the choices by themselves."""

from dataclasses import replace

import onnx
import pytest
import torch
from expert_models import VOCABULARY, random_experts
from sparsify_export.passes.errors import VerificationError
from sparsify_export.passes.frontend.batches import token_batches
from sparsify_export.passes.frontend.load import describe
from sparsify_export.passes.frontend.trace import trace
from sparsify_export.passes.fx.canonical import canonicalise
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.run import run_part, run_part_float64
from sparsify_export.passes.lower import to_onnx
from sparsify_export.runtime import routing
from sparsify_export.runtime.published import ask
from sparsify_export.runtime.verify import expect, verify


@pytest.fixture(scope="module")
def mixtral():
    model = random_experts("mixtral")
    traced = trace(describe(model))
    canonicalise(traced.program)
    parts = partition(traced.program)
    params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    (batch,) = token_batches(traced, ids, names=("input_ids", "attention_mask"))
    return model, traced, parts, params, batch


def test_a_run_tells_what_it_chose_and_can_be_led(mixtral):
    _, _, parts, params, batch = mixtral
    found = routing.routing_of(parts)
    assert found.rankings == 2
    free = found.run(params, batch, run_part_float64)
    assert [tuple(x.shape) for x in free.chosen] == [(40, 2), (40, 2)]
    for chosen, scores in zip(free.chosen, free.scores, strict=True):
        assert torch.equal(scores.topk(2, dim=-1).indices, chosen)
    led = found.run(params, batch, run_part_float64, free.chosen)
    assert all(torch.equal(a, b) for a, b in zip(led.outputs, free.outputs, strict=True))
    plain = found.run(params, batch, run_part)
    assert routing.same(plain.chosen, free.chosen, batch)
    assert routing.in_order(led, plain, batch).ok

    other = (free.chosen[0].roll(1, 0), free.chosen[1])
    away = found.run(params, batch, run_part_float64, other)
    assert torch.equal(away.chosen[0], other[0])
    assert not torch.allclose(away.outputs[0], free.outputs[0], atol=1e-3)
    assert not routing.same(other, free.chosen, batch)
    assert not routing.in_order(away, found.run(params, batch, run_part, other), batch).ok


def test_a_choice_between_two_that_rank_alike_is_in_order(mixtral):
    """The second and the third expert of one token are made to rank as far apart as rounding moves them."""
    _, _, parts, params, batch = mixtral
    found = routing.routing_of(parts)
    free, plain = (found.run(params, batch, run) for run in (run_part_float64, run_part))
    third = free.scores[0][7].topk(3).indices[2]
    chosen = free.chosen[0].clone()
    second, chosen[7, 1] = chosen[7, 1].clone(), third
    for gap, fits in ((1e-7, True), (1e-3, False)):
        runs = []
        for run in (free, plain):
            scores = run.scores[0].clone()
            scores[7, third] = scores[7, second] - gap
            runs.append(replace(run, chosen=(chosen, run.chosen[1]), scores=(scores, run.scores[1])))
        assert routing.in_order(*runs, batch).ok is fits


def test_models_without_experts_are_run_as_they_are(mixtral):
    *_, parts, _, _ = mixtral
    none = replace(parts, parts=parts.parts[:1])
    assert routing.routing_of(none) == routing.Routing(none)


def test_a_file_is_compared_with_the_experts_that_it_chose_and_those_are_judged(mixtral, tmp_path, monkeypatch):
    """A file that chooses as it should passes; one whose router is another one is told apart by its choices."""
    model, traced, parts, params, batch = mixtral
    expected = expect(parts, params, [ask(model, traced, batch)])
    assert expected[0].rankings == 2
    path = tmp_path / "model.onnx"
    to_onnx(traced, path, metadata={})  # consumes the program: the last test of the file
    assert len(verify(path, traced, expected, ways={"functions": False})) == 2
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".data", ".onnx"]  # the copy is gone
    # Nothing was chosen in both runs alike: the file's choices are followed, and come to the same.
    unknown = [replace(each, chosen=None) for each in expected]
    assert len(verify(path, traced, unknown, ways={"functions": False})) == 2

    proto = onnx.load(str(path))
    first = next(node for node in proto.graph.node if node.op_type == "TopK")
    largest = next(a for a in [*first.attribute, onnx.helper.make_attribute("largest", 1)] if a.name == "largest")
    if largest not in first.attribute:
        first.attribute.append(largest)
    next(a for a in first.attribute if a.name == "largest").i = 0  # the two worst experts
    wrong = tmp_path / "wrong.onnx"
    onnx.save(proto, str(wrong))
    with pytest.raises(VerificationError, match=r"wrong\.onnx chooses other experts than the model \(functions\)"):
        verify(wrong, traced, expected, ways={"functions": False})
