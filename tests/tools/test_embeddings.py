"""Embedding tables of 8 bits: in the file, in the report, in ONNX Runtime without our library."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from families import TEXT, WIDE
from onnx import TensorProto, numpy_helper
from onnx_command import compiled
from onnx_models import build, dense, node, saved, sparse_kn
from safetensors.torch import load_file
from sparsify_export import cli
from sparsify_export.cli import main
from sparsify_export.passes import tables
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
    monkeypatch.setattr(tables, "LEAST_SAVED", 10_000)


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


def lookups(*, tied):
    """A table of 96 rows that two lookups read, one of four, and a linear of 2:4; ``tied`` multiplies by it."""
    nodes = [
        node("Gather", ["table", "ids"], ["words"]),
        node("Gather", ["small", "kinds"], ["kind"]),
        node("Gather", ["table", "others"], ["more"]),
        node("Add", ["words", "kind"], ["h"]),
        node("Add", ["h", "more"], ["g"]),
        node("MatMul", ["g", "w"], ["m"], name="fc"),
        node("Relu", ["m"], ["y"]),
    ]
    if tied:
        nodes += [node("Transpose", ["table"], ["turned"], perm=[1, 0]), node("MatMul", ["y", "turned"], ["z"])]
    weights = {"table": dense(96, 64, 1), "small": dense(4, 64, 2), "w": sparse_kn(64, 64)}
    inputs = {name: ["batch", "tokens"] for name in ("ids", "others", "kinds")}
    proto = build(nodes, inputs, ["z" if tied else "y"], weights)
    for value in proto.graph.input:
        value.type.tensor_type.elem_type = TensorProto.INT64
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return proto


def test_tables_of_an_onnx_file_are_codes_for_all_that_look_them_up(tmp_path):
    path = saved(lookups(tied=False), tmp_path, "given.onnx")
    report = compiled(path, tmp_path / "o.onnx", "--dtype", "int8")
    words, small = report["embeddings"]
    assert (words["path"], words["reason"]) == ("table", "")
    assert (words["dense_bytes"], words["stored_bytes"]) == (96 * 64 * 4, 96 * (64 + 4))
    assert small["reason"] == "8-bit codes would save 752 bytes"
    graph = onnx.load(tmp_path / "o.onnx").graph
    ops = ["Gather", "Cast", "Gather", "Mul", "Gather", *["Gather", "Cast", "Gather", "Mul"], "Add", "Add"]
    assert [n.op_type for n in graph.node] == [*ops, "linear_nm_int8", "Relu"]
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    table = dense(96, 64, 1)
    scales = np.abs(table).max(axis=1, keepdims=True) / np.float32(127)
    assert "table" not in stored
    assert np.array_equal(stored["table.codes"], np.rint(table / scales))
    assert np.array_equal(stored["table.scales"], scales)


def test_a_table_of_an_onnx_file_that_is_a_weight_as_well_stays(tmp_path):
    report = compiled(saved(lookups(tied=True), tmp_path), tmp_path / "o.onnx", "--dtype", "int8")
    assert report["embeddings"][0]["reason"] == "it is tied to something that is no lookup, such as the head"


def test_codes_of_another_table_are_found(tmp_path, capsys, monkeypatch):
    """Twice as large in the file and in what it is compared with: the given table tells."""
    coded = tables.coded
    monkeypatch.setattr(tables, "coded", lambda table: coded(2 * table))
    path = saved(lookups(tied=False), tmp_path, "given.onnx")
    assert main([str(path), "--dtype", "int8", "--quiet", "-o", str(tmp_path / "o.onnx")]) == 4
    assert "table: its 8-bit codes are not the table of given.onnx" in capsys.readouterr().err
