"""Embedding tables of 8 bits: in the file, in the report, in ONNX Runtime without our library."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from families import TEXT, WIDE
from onnx import numpy_helper
from safetensors.torch import load_file
from sparsify_export import cli
from sparsify_export.cli import main
from sparsify_export.passes.fx import embeddings
from transformers import BertConfig, BertModel


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT without a head; the row of its padding token is zeros."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("encoder") / "bert"
    BertModel(BertConfig(**WIDE, **TEXT)).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(embeddings, "LEAST_SAVED", 10_000)


def test_the_file_holds_codes_that_stock_onnxruntime_does_not_turn_into_a_table_of_floats(
    encoder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(cli.terminal, "width", 200)
    out = tmp_path / "model.onnx"
    assert main([str(encoder), "--dtype", "int8", "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "table embeddings.word_embeddings [96, 64]" in shown
    assert "8-bit codes would save 376 bytes" in shown
    dense = load_file(encoder / "model.safetensors")["embeddings.word_embeddings.weight"].numpy()
    scales = np.abs(dense).max(axis=1, keepdims=True) / np.float32(127)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(out).graph.initializer}
    assert not scales[0].any()
    codes = np.rint(dense / np.where(scales, scales, 1))
    assert np.array_equal(stored["model.embeddings.word_embeddings.weight.codes"], codes)
    assert np.array_equal(stored["model.embeddings.word_embeddings.weight.scales"], scales)
    words, types, _ = json.loads((tmp_path / "model.onnx.report.json").read_text())["embeddings"]
    assert (words["path"], words["shape"], words["reason"]) == ("embeddings.word_embeddings", [96, 64], "")
    assert (words["dense_bytes"], words["stored_bytes"]) == (96 * 64 * 4, 96 * (64 + 4))
    assert 0 < words["error"] < 1e-4
    assert types["reason"] == "8-bit codes would save 376 bytes"
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.log_severity_level = 3  # that it serves this machine only
    ort.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
    run = onnx.load(tmp_path / "run.onnx").graph.initializer
    assert [tensor.data_type for tensor in run if list(tensor.dims) == [96, 64]] == [onnx.TensorProto.INT8]


def test_codes_that_are_not_the_table_fail_verification(encoder, tmp_path, capsys, monkeypatch):
    """The published model and the graph get the table of floats here, which the file no longer holds."""
    monkeypatch.setattr("sparsify_export.compile.stored_tables", lambda program, found: {})
    assert main([str(encoder), "--dtype", "int8", "--quiet", "-o", str(tmp_path / "model.onnx")]) == 4
    assert "differs from the model" in capsys.readouterr().err
