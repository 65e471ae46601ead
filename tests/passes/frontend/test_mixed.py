"""Text and pictures at once: both stacks of layers are cut, and the graph is the model for any number of either."""

import pytest
import torch
import transformers as t
from sparsify_export.calibration_data import probes_of
from sparsify_export.passes.frontend.load import describe
from sparsify_export.passes.frontend.trace import trace
from sparsify_export.passes.fx.canonical import canonicalise
from sparsify_export.passes.fx.partition import partition
from sparsify_export.runtime.published import ask
from sparsify_export.runtime.verify import expect
from sparsify_export.settings import Settings

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 96, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    vision = {**WIDE, "image_size": 32, "patch_size": 16}
    config = t.CLIPConfig(text_config={**WIDE, **TEXT}, vision_config=vision, projection_dim=16)
    pretrained = describe(t.CLIPModel(config))
    return pretrained, trace(pretrained)


def test_inputs_of_both_kinds_are_taken(clip):
    pretrained, traced = clip
    assert pretrained.kind == "encoder"
    assert not pretrained.takes_text_alone
    assert traced.inputs == ("input_ids", "attention_mask", "pixel_values")
    assert traced.sample == (3, 32, 32)
    assert traced.outputs[:2] == ("logits_per_image", "logits_per_text")


def test_as_many_texts_as_pictures_or_not(clip):
    pretrained, traced = clip
    ids, mask = torch.randint(3, 96, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got = traced.program.module(check_guards=False)(ids, mask, pictures)
        told = pretrained.model(input_ids=ids, attention_mask=mask, pixel_values=pictures)
    torch.testing.assert_close(got[0], told.logits_per_image)
    assert got[0].shape == (2, 3)


def test_both_stacks_are_cut_and_the_graph_is_the_model(clip):
    pretrained, traced = clip
    probes = probes_of(traced, pretrained, [], None, Settings(None))
    assert [len(x) for x in probes[2].inputs] == [3, 3, 3]
    assert not bool(probes[2].token_mask.all())
    canonicalise(traced.program)
    parts = partition(traced.program)
    assert [part.path for part in parts.blocks] == [
        f"{side}_model.encoder.layers.{i}" for side in ("vision", "text") for i in range(2)
    ]
    params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
    expect(parts, params, [ask(pretrained.model, traced, probe) for probe in probes])
