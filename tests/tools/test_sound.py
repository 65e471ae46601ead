"""Sound: files take it in any length where the model does, with and without pruning; else they say why not."""

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers as t
from sparsify_export.cli import main
from sparsify_export.runtime.benchmark import bench

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONVOLUTIONS = {"conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
PLACES = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}


def _saved(model, folder):
    torch.manual_seed(0)
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """A tiny Wav2Vec2, and the folder it is in."""
    folder = tmp_path_factory.mktemp("sound") / "wav2vec2"
    torch.manual_seed(0)
    config = t.Wav2Vec2Config(**WIDE, **CONVOLUTIONS, **PLACES, vocab_size=32)
    return _saved(t.Wav2Vec2ForCTC(config), folder), folder


@pytest.fixture(scope="module")
def spectra(tmp_path_factory):
    """The folder of a tiny AST, whose patches have a place each."""
    folder = tmp_path_factory.mktemp("sound") / "ast"
    torch.manual_seed(0)
    shape = {"max_length": 64, "num_mel_bins": 32, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
    _saved(t.ASTForAudioClassification(t.ASTConfig(**WIDE, **shape)), folder)
    return folder


@pytest.mark.slow
def test_the_dense_baseline_of_waves_takes_any_length(waves, tmp_path, capsys):
    model, folder = waves
    out = tmp_path / "dense.onnx"
    assert main([str(folder), "-o", str(out)]) == 0
    assert "the file takes input_values of any length" in " ".join(capsys.readouterr().err.split())
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch_size", "length"]
    assert session.get_outputs()[0].shape == ["batch_size", "output_length", 32]
    for batch, length in ((1, 3000), (2, 517), (3, 20001)):  # the model itself is the truth
        wave = torch.randn(batch, length, generator=torch.Generator().manual_seed(length))
        want = model(wave).logits.detach().numpy()
        np.testing.assert_allclose(session.run(None, {"input_values": wave.numpy()})[0], want, atol=1e-5)
    assert [row.name for row in bench(out, repeats=1).rows] == ["batch 1"]


def test_pruned_waves_are_verified_at_several_lengths(waves, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(2):
        wave = np.random.default_rng(i).standard_normal((4, 800), np.float32)
        np.savez(tmp_path / "in" / f"{i}.npz", input_values=wave)
    asked = []
    from sparsify_export import compile as compiler

    monkeypatch.setattr(compiler, "ask", lambda *args, ask=compiler.ask: asked.append(args[2]) or ask(*args))
    out = tmp_path / "sparse.onnx"
    flags = ["--nm", "2:4", "--effort", "fast", "--calibration-inputs", str(tmp_path / "in"), "--quiet"]
    assert main([str(waves[1]), *flags, "-o", str(out)]) == 0
    assert [tuple(batch.inputs[0].shape) for batch in asked] == [(1, 800), (2, 640), (3, 400)]
    report = json.loads((tmp_path / "sparse.onnx.report.json").read_text())
    assert sum(entry["op"] == "linear_nm" for entry in report["linears"]) == 12
    assert [row["name"] for row in report["latency"]] == ["batch 1"]


def test_spectra_whose_patches_have_places_keep_their_size_and_are_told(spectra, tmp_path, capsys):
    out = tmp_path / "dense.onnx"
    assert main([str(spectra), "-o", str(out)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the file takes input_values of [64, 32] a sample and of no other size, as the model does" in said
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch_size", 64, 32]
