"""The fault list: each fault ends in one sentence and exit code 2, soon, and leaves nothing behind."""

import io
import json
import os
import shutil
import signal
import struct
import zipfile

import numpy as np
import onnx
import pytest
from commands import SHORT, refused
from onnx_models import dense, mlp
from sparsify_export.cli import main

NM = ["--nm", "2:4"]


@pytest.fixture(autouse=True)
def _soon():
    """Nothing takes long: a test that hangs fails."""

    def late(number, frame):
        raise KeyboardInterrupt("it hangs")  # the guard of the command makes a sentence of any other exception

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the model that a test may damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def string(text):
    return struct.pack("<Q", len(text)) + text


def gguf(tensors, pairs, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


TENSOR = string(b"t") + struct.pack("<IQIQ", 1, 1, 0, 0) + bytes(64)
ARCHITECTURE = string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        gguf(0, 0),
        gguf(1 << 60, 0),
        gguf(0, 1 << 60),
        gguf(0, 1, struct.pack("<Q", 1 << 62) + b"x"),
        gguf(0, 1, ARCHITECTURE),
        gguf(0, 2, ARCHITECTURE + ARCHITECTURE),
        gguf(0, 2, ARCHITECTURE + string(b"llama.block_count") + struct.pack("<II", 4, 0xFFFFFFFF)),
        gguf(1, 2, ARCHITECTURE + string(b"llama.block_count") + struct.pack("<II", 4, 0xFFFFFFFF) + TENSOR),
        gguf(0, 1, string(b"a") + struct.pack("<IIQ", 9, 9, 1 << 60)),
        gguf(1, 1, ARCHITECTURE + string(b"t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)),
    ],
    ids=range(12),
)
def test_gguf(tmp_path, capsys, content):
    (tmp_path / "m.gguf").write_bytes(content)
    refused(capsys, tmp_path / "o.onnx", tmp_path / "m.gguf")


def header(text):
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(raw)) + raw


WEIGHT = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", 100) + b"{}",
        header(b"{" * 100_000),
        header({"w": WEIGHT}),
        header({"w": WEIGHT | {"shape": [1 << 40, 1 << 40]}}) + bytes(16),
        header({"w": WEIGHT | {"data_offsets": [16, 0]}}) + bytes(16),
        header({"w": WEIGHT | {"dtype": "F99"}}) + bytes(16),
        header(b'{"w": ' + json.dumps(WEIGHT).encode() + b', "w": ' + json.dumps(WEIGHT).encode() + b"}") + bytes(16),
        header({"w": WEIGHT, "v": WEIGHT}) + bytes(16),
    ],
    ids=range(10),
)
def test_safetensors(copy, tmp_path, capsys, content):
    (copy / "model.safetensors").write_bytes(content)
    refused(capsys, tmp_path / "o.onnx", copy)
    (tmp_path / "masks.safetensors").write_bytes(content)
    refused(capsys, tmp_path / "o.onnx", copy, "--mask", tmp_path / "masks.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**30},
        {"num_hidden_layers": "many"},
        {"num_labels": 10**9},
        {"hidden_size": 1 << 40},
        {"vocab_size": 10**12},
        {"num_attention_heads": 0},
        {"num_attention_heads": -1},
        {"hidden_size": None},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"architectures": [5]},
        {"architectures": ["set_seed"]},
        {"model_type": ["llama"]},
        {"model_type": "[/red]\x1b[2J"},
        {"rope_scaling": {"rope_type": "no such"}},
        "[" * 100_000,
        "[]",
        "3",
        '{"a": ' + "1" * 10_000 + "}",
        "\ufffd",
        "",
    ],
    ids=lambda change: str(change)[:40],
)
def test_configurations(copy, tmp_path, capsys, change):
    if isinstance(change, dict):
        change = json.dumps(json.loads((copy / "config.json").read_text()) | change)
    (copy / "config.json").write_text(change)
    refused(capsys, tmp_path / "o.onnx", copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "anything"])
def test_pipes_and_devices_in_a_model(copy, tmp_path, capsys, name):
    for make in (os.mkfifo, lambda file: file.symlink_to("/dev/zero")):
        (copy / name).unlink(missing_ok=True)
        make(copy / name)
        refused(capsys, tmp_path / "o.onnx", copy)


def array(shape, data=b""):
    raw = io.BytesIO()
    np.lib.format.write_array_header_1_0(raw, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return raw.getvalue() + data


def archive(name, content):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr(name, content)
    return raw.getvalue()


def bomb():
    raw = bytearray(archive("x.npy", array((1 << 20,), bytes(4 << 20))))
    at = raw.rfind(b"PK\x01\x02") + 24
    raw[at : at + 4] = struct.pack("<I", 0xFFFFFFFE)  # it says that it has 4 GiB
    return bytes(raw)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        archive("x.npy", array((1 << 40,))),
        archive("x.npy", array((-1,))),
        archive("x.npy", array((2, 2), bytes(8))),
        archive("x.txt", b"hello"),
        archive("x.npy", b"\x93NUMPY\x09\x00" + bytes(200)),
        archive("x.npy", array((2, 2), bytes(16)))[:-40],
        bomb(),
    ],
    ids=range(9),
)
def test_npz(images, given, tmp_path, capsys, content):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "a.npz").write_bytes(content)
    for source in (images, given):
        refused(capsys, tmp_path / "o.onnx", source, *NM, "--calibration-inputs", inputs)


@pytest.mark.parametrize("kind", ["binary", "empty", "pipe", "device", "folder", "long", "nested", "digits", "halves"])
def test_texts(folder, tmp_path, capsys, kind):
    file = tmp_path / ("text.jsonl" if kind in ("nested", "digits", "halves") else "text.txt")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    elif kind == "long":
        file = tmp_path / ("x" * 300)
    else:
        file.write_bytes(
            {
                "binary": bytes(range(256)),
                "empty": b"",
                "nested": b"[" * 100_000,
                "digits": b'{"text": ' + b"1" * 10_000 + b"}",
                "halves": rb'{"text": "\ud800"}',
            }[kind]
        )
    refused(capsys, tmp_path / "o.onnx", folder, *NM, "--calibration", file, *SHORT)
    assert main(["eval", str(folder), "--text", str(file)]) == 2


@pytest.mark.parametrize(
    "flags",
    [["--seed", "-1"], ["--seed", str(1 << 70)], ["--skip", "a[b]c"], ["--skip", "[/x]"], ["--mask", "x" * 300]],
    ids=str,
)
def test_flags(folder, tmp_path, capsys, flags):
    refused(capsys, tmp_path / "o.onnx", folder, *NM, *flags, *SHORT)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".onnx", "a\0b.onnx", "\udc80/m.onnx"])
def test_paths(given, tmp_path, capsys, name):
    for arguments in (
        [name, "-o", str(tmp_path / "o.onnx")],
        [str(given), "-o", str(tmp_path / name)],
        ["inspect", name],
        ["eval", name, "--exact"],
        ["generate", name, "--prompt", "x"],
        ["simulate", name],
        ["bench", name],
    ):
        assert main(arguments) == 2, arguments
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert "Traceback" not in said
        assert said.isprintable()
    assert [file.name for file in tmp_path.iterdir()] == ["given.onnx"]


def test_outputs(given, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "nowhere")
    for out in ("file/m.onnx", "file/", "folder.onnx", "link.onnx", "no/such/m.onnx"):
        before = sorted(tmp_path.iterdir())
        assert main([str(given), "-o", f"{tmp_path}/{out}"]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert sorted(tmp_path.iterdir()) == before
    assert main([str(given), "-o", "/dev/null/m.onnx"]) == 2
    assert main([str(given), "-o", ""]) == 2


def test_onnx_data_that_is_a_pipe_or_a_device(given, tmp_path, capsys):
    onnx.save(onnx.load(given), tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    for make in (os.mkfifo, lambda file: file.symlink_to("/dev/zero")):
        (tmp_path / "m.data").unlink()
        make(tmp_path / "m.data")
        refused(capsys, tmp_path / "o.onnx", tmp_path / "m.onnx")
        for command in ("inspect", "simulate", "bench"):
            assert main([command, str(tmp_path / "m.onnx")]) == 2


def test_onnx_files_that_are_pipes_or_devices(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "device.onnx").symlink_to("/dev/zero")
    for name in ("pipe.onnx", "device.onnx"):
        refused(capsys, tmp_path / "o.onnx", tmp_path / name)
        for command in (["inspect"], ["simulate"], ["bench"], ["eval", "--exact"], ["generate", "--prompt", "x"]):
            assert main([command[0], str(tmp_path / name), *command[1:]]) == 2


def test_commands_without_a_language_model(given, tmp_path, capsys):
    onnx.save(mlp(dense(64, 64)), tmp_path / "m.onnx")
    for command in (["eval", "--exact"], ["generate", "--prompt", "x"]):
        assert main([command[0], str(tmp_path / "m.onnx"), *command[1:]]) == 2
        assert "not a causal language model" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["x", -1, None, 10**30, [1]])
def test_lengths_that_a_tokenizer_says(copy, text, limit, capsys):
    told = json.loads((copy / "tokenizer_config.json").read_text()) | {"model_max_length": limit}
    (copy / "tokenizer_config.json").write_text(json.dumps(told))
    code = main(["eval", str(copy), "--text", str(text), "--window", "32", "--windows", "1"])
    assert code in (0, 2)  # used without the length, or refused
    assert len(capsys.readouterr().err.strip().splitlines()) == (1 if code else 0)


def test_what_nobody_thought_of_is_one_sentence_and_the_log_has_the_rest(given, tmp_path, capsys, monkeypatch):
    from sparsify_export import onnx_in

    def broken(*args, **kwargs):
        raise ZeroDivisionError("a fault\nof ours")

    monkeypatch.setattr(onnx_in, "make_sparse", broken)
    command = [str(given), *NM, "--quiet", "-o", str(tmp_path / "o.onnx")]
    assert main(command) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "ZeroDivisionError: a fault of ours" in said
    assert "run it again with --log-file FILE" in said
    assert [file.name for file in tmp_path.iterdir()] == ["given.onnx"]
    assert main([*command, "--log-file", str(tmp_path / "log")]) == 1
    assert "in broken" in (tmp_path / "log").read_text()


def test_library_warnings_go_to_the_log_and_not_to_the_screen(given, tmp_path, capfd, monkeypatch):
    import logging
    import warnings

    from sparsify_export import onnx_in

    original = onnx_in.make_sparse

    def noisy(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn("deprecated\x1b[2J", stacklevel=1)
        logging.getLogger("some.library").warning("careful")
        return original(*args, **kwargs)

    monkeypatch.setattr(onnx_in, "make_sparse", noisy)
    assert main([str(given), *NM, "--quiet", "-o", str(tmp_path / "o.onnx"), "--log-file", str(tmp_path / "log")]) == 0
    assert capfd.readouterr() == ("", "")
    assert "deprecated" in (tmp_path / "log").read_text()
    assert "careful" in (tmp_path / "log").read_text()


def test_usage(capsys):
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out
    assert main(["evall", "x"]) == 2
    assert "evall is no command and no model that exists; did you mean eval?" in capsys.readouterr().err
