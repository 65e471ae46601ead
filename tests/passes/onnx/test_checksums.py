"""Checksums of packed weights: one flipped bit is found, in the linear that holds it."""

import hashlib
import json
import os

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from sparsify_export.cli import BAD_INPUT, DONE, main
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.onnx.checksums import KEY, Checked, verify_checksums
from sparsify_export.passes.onnx.write import write_proto
from sparsify_export.runtime import session

ROWS, COLUMNS = 256, 256
NAMES = ("values", "indices", "scales")


def tensors(name):
    """Bytes as ``linear_nm_int8`` stores them; each at least 1 KiB, so that all lie in the data file."""
    rng = np.random.default_rng(ord(name))
    pairs = np.array([first | second << 2 for second in range(4) for first in range(second)], np.uint8)
    groups = rng.choice(pairs, (ROWS, COLUMNS // 8, 2))
    return {
        f"{name}.values": rng.integers(-127, 128, (ROWS, COLUMNS // 2), np.int8),
        f"{name}.indices": groups[..., 0] | groups[..., 1] << 4,
        f"{name}.scales": rng.random(ROWS, np.float32),
    }


@pytest.fixture
def path(tmp_path):
    """Two linears, a and b, written with their checksums."""
    nodes = [
        helper.make_node("linear_nm_int8", [x, *tensors(n)], [y], n, domain="sparsify", n=2, m=4)
        for n, x, y in (("a", "x", "h"), ("b", "h", "y"))
    ]
    values = [helper.make_tensor_value_info(v, 1, ["t", COLUMNS]) for v in ("x", "y")]
    stored = [numpy_helper.from_array(array, name) for n in "ab" for name, array in tensors(n).items()]
    proto = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], stored))
    proto.metadata_props.add(key=KEY, value="an older one")
    write_proto(proto, tmp_path / "m.onnx", base=tmp_path, check=False)
    return tmp_path / "m.onnx"


def flip(path, name):
    """Flip the lowest bit of a byte in the middle of a tensor, in the data file."""
    proto = onnx.load(str(path), load_external_data=False)
    (tensor,) = (t for t in proto.graph.initializer if t.name == name)
    where = {entry.key: entry.value for entry in tensor.external_data}
    place = int(where["offset"]) + int(where["length"]) // 2
    with (path.parent / where["location"]).open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_the_digest_is_blake2b_of_the_bytes_in_the_order_of_the_inputs(path):
    (text,) = (p.value for p in onnx.load(str(path)).metadata_props if p.key == KEY)
    assert json.loads(text) == {
        y: hashlib.blake2b(b"".join(a.tobytes() for a in tensors(n).values()), digest_size=16).hexdigest()
        for n, y in (("a", "h"), ("b", "y"))
    }
    assert verify_checksums(path) == Checked(2, 2 * sum(a.nbytes for a in tensors("a").values()))


@pytest.mark.parametrize("linear", "ab")
@pytest.mark.parametrize("part", NAMES)
def test_a_flipped_bit_names_its_linear(path, linear, part):
    flip(path, f"{linear}.{part}")
    with pytest.raises(InputError, match=f"the data of {linear} is not what was written"):
        verify_checksums(path)


def test_the_command(path, capsys):
    assert main(["inspect", str(path), "--verify"]) == DONE
    assert "2 linears, 83968 bytes: as they were written" in capsys.readouterr().out
    flip(path, "a.scales")
    flip(path, "b.values")
    assert main(["inspect", str(path), "--verify"]) == BAD_INPUT
    assert "the data of a, b is not" in " ".join(capsys.readouterr().err.split())


def test_a_stack_of_experts_has_one_too(tmp_path):
    stored = {**tensors("e"), "e.bias": np.zeros(ROWS, np.float32)}
    node = helper.make_node(
        "experts_linear_nm_int8", ["x", "ids", *stored], ["y"], "stack", domain="sparsify", n=2, m=4, experts=4
    )
    inputs = [helper.make_tensor_value_info("x", 1, ["t", COLUMNS]), helper.make_tensor_value_info("ids", 7, ["t"])]
    output = helper.make_tensor_value_info("y", 1, ["t", ROWS // 4])
    kept = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    proto = helper.make_model(helper.make_graph([node], "g", inputs, [output], kept))
    path = tmp_path / "m.onnx"
    write_proto(proto, path, base=tmp_path, check=False)
    assert verify_checksums(path) == Checked(1, sum(array.nbytes for array in tensors("e").values()))
    flip(path, "e.indices")
    with pytest.raises(InputError, match="the data of stack is not what was written"):
        verify_checksums(path)


BEFORE_IT_RUNS = {
    "bench": ["--repeats", "1"],
    "eval": ["--exact"],
    "generate": ["--prompt", "a"],
}


@pytest.mark.parametrize("command", BEFORE_IT_RUNS)
def test_before_a_file_is_run(command, path, capsys, monkeypatch):
    monkeypatch.setattr(session, "ort", None)  # nothing may be opened by then
    flip(path, "b.values")
    assert main([command, str(path), *BEFORE_IT_RUNS[command], "--verify"]) == BAD_INPUT
    assert "the data of b is not what was written" in " ".join(capsys.readouterr().err.split())


def test_a_sound_file_runs(path):
    assert main(["bench", str(path), "--repeats", "1", "--verify"]) == DONE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "has no checksums"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is not a table"),
        ('{"h": 3}', "is not a table"),
        ('{"h": ""}', "b has no checksum"),
        ('{"h": "", "y": "", "z": ""}', "'z', which is no sparse linear"),
    ],
)
def test_metadata_of_strangers(path, text, said):
    proto = onnx.load(str(path), load_external_data=False)
    del proto.metadata_props[:]
    if text is not None:
        proto.metadata_props.add(key=KEY, value=text)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=said):
        verify_checksums(path)


def test_a_data_file_cut_short_or_missing(path):
    (data,) = path.parent.glob("*.data")
    os.truncate(data, 2000)
    with pytest.raises(InputError, match=r"the weight of a cannot be read"):
        verify_checksums(path)
    data.unlink()
    with pytest.raises(InputError, match=r"the weight of a cannot be read"):
        verify_checksums(path)
