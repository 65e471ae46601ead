"""Sliding windows that verification crosses or names, and texts longer than the model takes."""

import json

import onnx
import pytest
import torch
import transformers as t
from families import GROUPED
from sparsify_export import calibration_data
from sparsify_export import compile as compiler
from sparsify_export.cli import main
from sparsify_export.passes.frontend.load import describe

WINDOW = 700


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """The folder of a tiny Gemma-3 whose first layer sees 700 tokens; more than any model was crossed at before."""
    folder = tmp_path_factory.mktemp("windowed") / "gemma"
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    config = t.Gemma3TextConfig(
        **{**GROUPED, "max_position_embeddings": 1024}, sliding_window=WINDOW, layer_types=layers
    )
    t.Gemma3ForCausalLM(config).eval().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_long_window_of_a_small_model_is_crossed(windowed, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(compiler, "ask", lambda *args, ask=compiler.ask: asked.append(args[2]) or ask(*args))
    assert main([str(windowed), "--quiet", "-o", str(tmp_path / "m.onnx")]) == 0
    last = asked[-1].inputs[0].shape[1]
    assert last < WINDOW < last + 8  # the loop writes eight tokens, and the window ends among them
    assert json.loads((tmp_path / "m.onnx.report.json").read_text())["uncrossed"] == []


@pytest.mark.slow
def test_a_window_that_would_take_too_long_is_named(windowed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibration_data, "PRODUCTS", 1)
    assert main([str(windowed), "-o", str(tmp_path / "m.onnx")]) == 0
    told = capsys.readouterr()
    assert f"verification does not cross the sliding window of {WINDOW} tokens" in " ".join(told.err.split())
    assert f"texts longer than the sliding window of {WINDOW}" in " ".join(told.out.replace("│", "").split())
    assert json.loads((tmp_path / "m.onnx.report.json").read_text())["uncrossed"] == [WINDOW]


def test_a_window_as_long_as_the_model_takes_is_no_boundary():
    config = t.MistralConfig(**{**GROUPED, "max_position_embeddings": 64}, sliding_window=64)
    torch.manual_seed(0)
    assert calibration_data.crossings(describe(t.MistralForCausalLM(config))) == ((), ())


def test_texts_beyond_the_tables_of_longrope_end_in_one_sentence(folder, text, tmp_path, capsys):
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}
    config = t.Phi3Config(**GROUPED, rope_parameters=rope, original_max_position_embeddings=32)
    t.Phi3ForCausalLM(config).eval().save_pretrained(tmp_path / "phi")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "phi" / name).write_bytes((folder / name).read_bytes())
    out = tmp_path / "m.onnx"
    assert main([str(tmp_path / "phi"), "--quiet", "-o", str(out)]) == 0
    command = ["eval", str(out), "--tokenizer", str(folder), "--text", str(text), "--window", "33"]
    assert main(command) == 2  # the configuration says 128
    assert "--window 33 is more than the 32 tokens" in capsys.readouterr().err
    model = onnx.load(out, load_external_data=False)
    kept = [entry for entry in model.metadata_props if entry.key != "sparsify.context"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)  # as other tools' files are
    onnx.save(model, out)
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the model fails on a text of 33 tokens, which is more than it takes" in said
    assert "Gather" not in said
