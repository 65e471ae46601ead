"""``--also-checkpoint``: pruned weights that transformers reads, and that compile to the same file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refused
from families import random_model
from safetensors.torch import load_file
from sparsify_export import dense_checkpoint
from sparsify_export.calibrate.patterns import NM, find_pattern
from sparsify_export.cli import main
from sparsify_export.dense_checkpoint import write_checkpoint
from sparsify_export.passes.equivalence import compare_model
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.load import describe
from sparsify_export.runtime.session import CausalSession, open_session
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def data_of(folder: Path) -> Path:
    """The file of the weights, which is named by what is in it."""
    return next(folder.glob("*.data"))


def test_a_checkpoint_compiles_to_the_same_file(written, tmp_path):
    checkpoint, out = written
    assert main([str(checkpoint), "--quiet", "-o", f"{tmp_path / 'again'}/"]) == 0
    assert data_of(tmp_path / "again").name == data_of(out).name
    assert data_of(tmp_path / "again").read_bytes() == data_of(out).read_bytes()


def test_transformers_runs_what_the_file_computes(written):
    checkpoint, out = written
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert find_pattern(model.transformer.h[0].attn.c_attn.weight.T) == NM(2, 4)
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(0))
    session = CausalSession(open_session(out / "model.onnx"))
    ours, _ = session.step(ids.numpy(), np.ones_like(ids.numpy()), session.empty_past(2))
    plain, exact = model(ids).logits, model.double()(ids).logits
    close = compare_model(torch.from_numpy(ours), plain, exact)
    assert close.ok, close
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w0"}], tokenize=False) == "<s>w0</s>"


def test_nothing_in_it_says_that_it_is_sparse(written):
    checkpoint, _ = written
    assert {file.name for file in checkpoint.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    told = json.loads((checkpoint / "config.json").read_text())
    assert not {"quantization_config", "compression_config", "sparsity_config"} & set(told)
    assert told["dtype"] == "float32"
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")  # which is the embedding's
    assert {file.stat().st_mode & 0o777 for file in checkpoint.iterdir()} == {
        (checkpoint / "config.json").stat().st_mode & 0o777
    }


def test_bfloat16_in_shards_of_a_model_that_came_quantised(tmp_path, monkeypatch):
    model = random_model("llama")
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    model.generation_config = GenerationConfig(temperature=0.5)  # without do_sample, which cannot be saved
    monkeypatch.setattr(dense_checkpoint, "SHARD", "50KB")
    write_checkpoint(describe(model), tmp_path, torch.bfloat16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in tmp_path.glob("*.safetensors")}
    assert len(shards) > 2
    stored = {name: shards[file][name] for name, file in index["weight_map"].items()}
    assert stored.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(stored[name], value.bfloat16()), name
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["dtype"] == "bfloat16"
    assert "quantization_config" not in told
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.5
    assert model.config.quantization_config  # the model's own is left alone
    assert model.dtype == torch.float32


def test_refusals(folder, given, tmp_path, capsys):
    def said(where: Path, *flags: object, model: object = folder, out: str = "o") -> str:
        return refused(capsys, tmp_path / out, model, "--also-checkpoint", where, *flags)

    (tmp_path / "there").mkdir()
    assert "exists already" in said(tmp_path / "there")
    assert "exists already" in said(tmp_path / "there", "--overwrite")
    assert "lie in one another" in said(folder)
    assert "lie in one another" in said(tmp_path / "o")
    assert "lie in one another" in said(tmp_path / "there" / "in", "--overwrite", out="there")
    assert "is not a folder" in said(tmp_path / "missing" / "in")
    assert "has no meaning for an .onnx file" in said(tmp_path / "c", model=given, out="o.onnx")
    assert "--also-dtype bf16 has no effect" in refused(capsys, tmp_path / "o", folder, "--also-dtype", "bf16")


def test_a_full_disk_leaves_nothing_behind(images, tmp_path, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dense_checkpoint, "write_checkpoint", full)
    flags = ["--quiet", "-o", str(tmp_path / "o.onnx"), "--also-checkpoint", str(tmp_path / "c")]
    assert main([str(images), *flags]) == 2
    assert "c cannot be written: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_transformers_cannot_write_is_said(tmp_path, monkeypatch):
    model = random_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight  # tied by nobody's rule
    with pytest.raises(InputError, match="transformers cannot write a checkpoint"):
        write_checkpoint(describe(model), tmp_path, torch.float32)
