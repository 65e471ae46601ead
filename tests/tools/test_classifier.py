"""A decoder that classifies, through the command: with a padding token a padded batch is right, without one refused."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from commands import refused
from sparsify_export.cli import main
from sparsify_export.passes.equivalence import compare
from transformers import LlamaConfig, LlamaForSequenceClassification

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LENGTHS = (11, 8, 5)


def classifier(folder, padding):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=padding)).eval()
    model.save_pretrained(folder)
    return model


def test_without_a_padding_token_it_is_refused(tmp_path, capsys):
    classifier(tmp_path / "model", None)
    said = refused(capsys, tmp_path / "o.onnx", tmp_path / "model", "--quiet")
    assert said.endswith("without which it classifies one text at a time; set pad_token_id in its config.json")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The model, and its file in stock ONNX Runtime."""
    folder = tmp_path_factory.mktemp("classifier")
    model = classifier(folder / "model", 0)
    assert main([str(folder / "model"), "--quiet", "-o", str(folder / "o.onnx")]) == 0
    return model, ort.InferenceSession(str(folder / "o.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("texts", [1, 3])
def test_every_text_is_classified_as_it_is_alone(compiled, texts, side):
    model, session = compiled
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.zeros(texts, 11, dtype=torch.long), torch.zeros(texts, 11, dtype=torch.long)
    alone = []
    for row, length in enumerate(LENGTHS[:texts]):
        place = slice(11 - length, 11) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = torch.randint(1, 40, (length,), generator=generator), 1
        alone.append(ids[row : row + 1, place])
    got = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    with torch.no_grad():
        baseline = torch.cat([model(input_ids=text).logits for text in alone])
        exact = torch.cat([model.double()(input_ids=text).logits for text in alone])
    model.float()
    close = compare(torch.from_numpy(np.asarray(got)), baseline, exact, factor=8.0)
    assert close.ok, close
