"""What SECURITY.md promises: nothing that comes with a model runs, and nothing leaves the machine."""

import json
import pickle
import shutil
import socket

import onnx
import pytest
import torch
from commands import SHORT, refused
from onnx_models import dense, mlp, saved
from safetensors.torch import load_file, save_file
from sparsify_export.cli import main
from sparsify_export.terminal import terminal, visible
from transformers import dynamic_module_utils


class Touch:
    """Unpickled, this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def forbidden(monkeypatch):
    """Whatever must never be called; the list tells what was, as a library may swallow what we raise."""
    called = []

    def forbid(owner, name):
        def refuse(*args, **kwargs):
            called.append(name)
            raise AssertionError(f"{name} was called")

        monkeypatch.setattr(owner, name, refuse)

    for owner, name in [
        (pickle, "load"),
        (pickle, "loads"),
        (torch, "load"),
        (socket.socket, "connect"),
        (socket.socket, "connect_ex"),
        (socket, "getaddrinfo"),
        (dynamic_module_utils, "get_class_in_module"),
        (dynamic_module_utils, "init_hf_modules"),
    ]:
        forbid(owner, name)
    monkeypatch.setattr("builtins.input", lambda *args: called.append("input"))
    return called


@pytest.fixture
def hostile(folder, tmp_path):
    """A model whose files ask for all that: code of its own, an address, pickles beside the weights."""
    path = shutil.copytree(folder, tmp_path / "hostile")
    for name in ("modeling_own.py", "configuration_own.py", "tokenization_own.py", "psutil.py"):
        (path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    config = json.loads((path / "config.json").read_text())
    own = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "example/other--modeling_own.Own"}
    (path / "config.json").write_text(json.dumps(config | {"auto_map": own, "_name_or_path": "example/other"}))
    words = json.loads((path / "tokenizer_config.json").read_text())
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", "example/other--tokenization_own.Own"]}}
    (path / "tokenizer_config.json").write_text(json.dumps(words | own | {"name_or_path": "example/other"}))
    return path


def test_a_whole_run_calls_nothing_forbidden(hostile, text, tmp_path, forbidden, monkeypatch, capsys):
    monkeypatch.chdir(hostile)  # where a psutil.py lies
    out = tmp_path / "out"
    flags = ["--nm", "2:4", "--effort", "fast", "--calibration", str(text), *SHORT]
    assert main([str(hostile), *flags, "-o", str(out)]) == 0
    (out / "tokenizer_config.json").write_bytes((hostile / "tokenizer_config.json").read_bytes())
    assert main(["generate", str(out), "--prompt", "w1 w2", "--max-new-tokens", "2"]) == 0
    assert main(["eval", str(out), "--text", str(text), "--window", "32", "--windows", "1"]) == 0
    assert main(["inspect", str(out)]) == 0
    assert main(["simulate", str(hostile)]) == 0
    assert forbidden == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "weights.bin", "weights.pt", "/tmp/w.safetensors", 3])
def test_shards_are_safetensors_beside_their_list(hostile, tmp_path, capsys, forbidden, name):
    weights = load_file(hostile / "model.safetensors")
    (hostile / "model.safetensors").unlink()
    save_file(weights, tmp_path / "outside.safetensors", metadata={"format": "pt"})
    for file in ("weights.bin", "weights.pt"):
        (hostile / file).write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    listed = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (hostile / "model.safetensors.index.json").write_text(json.dumps(listed))
    assert "want .safetensors files beside it" in refused(capsys, tmp_path / "m.onnx", hostile)
    assert forbidden == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "other.safetensors.index.json", "../x.safetensors"])
def test_a_configuration_does_not_choose_the_file_of_its_weights(hostile, tmp_path, capsys, forbidden, name):
    config = json.loads((hostile / "config.json").read_text())
    (hostile / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    assert "names the file of its weights" in refused(capsys, tmp_path / "m.onnx", hostile)
    assert forbidden == []


def test_an_adapter_does_not_lead_to_another_model(hostile, tmp_path, capsys, forbidden):
    told = {"peft_type": "LORA", "base_model_name_or_path": "example/other"}
    (hostile / "adapter_config.json").write_text(json.dumps(told))
    assert "holds an adapter" in refused(capsys, tmp_path / "m.onnx", hostile)
    assert forbidden == []


@pytest.mark.parametrize("source", ['"example/other"', '"/etc"', "{broken", "3", '"' + "[" * 5000])
def test_what_a_file_says_it_was_made_from_is_not_opened(tmp_path, capsys, text, forbidden, source):
    proto = mlp(dense(64, 64))
    proto.metadata_props.add(key="sparsify.source", value=source)
    onnx.save(proto, tmp_path / "m.onnx")
    for command in (["eval", "--exact"], ["generate", "--prompt", "x"]):
        assert main([command[0], str(tmp_path / "m.onnx"), *command[1:]]) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert forbidden == []


HOSTILE_NAME = "\x1b[2J\x1b]0;owned\x07[/red][bold]:smiley:\u202eevil\r\x9b"


def test_names_from_files_do_not_steer_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "width", 300)
    proto = mlp(dense(64, 64))
    proto.graph.node[0].name = HOSTILE_NAME
    source = saved(proto, tmp_path, "m.onnx")
    assert main(["inspect", str(source)]) == 0
    assert main([str(source), "--nm", "2:4", "-o", str(tmp_path / "o.onnx")]) == 0
    assert main([str(source), "--nm", "2:4", "--skip", "x[/red]", "-o", str(tmp_path / "p.onnx")]) == 2
    assert main([str(tmp_path / "a[/red]:smiley:.onnx"), "-o", str(tmp_path / "[/bold].onnx")]) == 2
    told = capsys.readouterr()
    for said in (told.out, told.err):
        assert not set("\x1b\x07\x9b\u202e\r") & set(said)
    assert ":smiley:" in "".join(told.out.split())
    assert "[/red]" in told.err


def test_what_is_visible():
    assert visible("a\tb\n\u00e4\u4e2d\U0001f600") == "a\tb\n\u00e4\u4e2d\U0001f600"
    assert visible("\x1b[0m\x7f\x9b\udc80\u202e") == "\\x1b[0m\\x7f\\x9b\\udc80\\u202e"
