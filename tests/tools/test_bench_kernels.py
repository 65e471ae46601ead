"""The kernel benchmark: its packed weights mean what they should, and it runs and says what it measured."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_bitmask, linear_nm
from sparsify_export.runtime.machine import this_machine

TOOLS = Path(__file__).parent.parent.parent / "tools"
sys.path.append(str(TOOLS))  # behind the installed package, as the tool does it

from bench_kernels import parse  # noqa: E402
from kernel_bench import layers, report  # noqa: E402
from kernel_bench.contestants import Work  # noqa: E402
from kernel_bench.measure import Against, Result, alternate, check  # noqa: E402
from kernel_bench.rows import Row, required  # noqa: E402


def run_tool(*options: str) -> dict:
    line = [sys.executable, "-P", str(TOOLS / "bench_kernels.py"), "--json", *options]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def arrays(layer: layers.Layer) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.array for tensor in layer.tensors}


def decoded(row: Row) -> np.ndarray:
    """A quantised layer's weight, from its bytes by plain loops over runtime/cpu/kernels.h."""
    packed = arrays(layers.sparse(row))
    weight = np.zeros((row.rows, row.cols), np.float32)
    for n in range(row.rows):
        codes, place = [], 0
        if row.format == "nm":
            count, m = row.nm
            bits = {2: 1, 4: 2, 8: 4, 32: 8}[m]
            line = packed["values"][n]
            codes = unpacked(line, row.type)[: row.cols // m * count]
            for i, code in enumerate(codes):
                position = int(packed["indices"][n, i * bits // 8]) >> (i * bits % 8) & ((1 << bits) - 1)
                weight[n, i // count * m + position] = code
        else:
            line = packed["values"][packed["row_start"][n] : packed["row_start"][n + 1]]
            for begin in range(0, row.cols, 64):
                kept = [k for k in range(begin, min(begin + 64, row.cols)) if packed["mask"][n, k // 8] >> k % 8 & 1]
                size = math.ceil(len(kept) / 2) if row.type == "i4" else len(kept)
                codes = unpacked(line[place : place + size], row.type)
                for k, code in zip(kept, codes[: len(kept)], strict=True):
                    weight[n, k] = code
                place += size
            assert place == len(line)
    scales = packed["scales"].astype(np.float32)
    if row.type == "i8":
        return weight * scales[:, None]
    return weight * np.repeat(scales, row.group, axis=1)[:, : row.cols]


def unpacked(line: np.ndarray, type: str) -> list[int]:
    if type == "i8":
        return line.tolist()
    return [int(half) - 8 for byte in line for half in (byte & 15, byte >> 4)]


def rounded(row: Row) -> np.ndarray:
    """What quantising the same weight gives, by plain loops."""
    weight = layers.random_weight(row)[0]
    width, top, kind = (row.cols, 127, np.float32) if row.type == "i8" else (row.group, 7, np.float16)
    expected = np.zeros_like(weight)
    for n in range(row.rows):
        for begin in range(0, row.cols, width):
            part = weight[n, begin : begin + width]
            scale = np.float32(kind(np.abs(part).max() / np.float32(top)))
            if scale > 0:
                expected[n, begin : begin + width] = np.clip(np.rint(part / scale), -top, top) * scale
    return expected


@pytest.mark.parametrize("format", ["nm", "bitmask"])
@pytest.mark.parametrize("type", ["i8", "i4"])
@pytest.mark.parametrize("cols", [64, 100, 288])
@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (3, 4), (1, 2)])
def test_quantised_weights_mean_what_the_kernels_read(format, type, cols, nm):
    row = Row(format, type, 5, cols, 1, nm, sparsity=nm[0] / nm[1])
    np.testing.assert_array_equal(decoded(row), rounded(row))


@pytest.mark.parametrize("format", ["nm", "bitmask"])
def test_a_weight_that_is_nearly_empty(format):
    row = Row(format, "i4", 4, 192, 1, (1, 32), sparsity=0.99)
    np.testing.assert_array_equal(decoded(row), rounded(row))


@pytest.mark.parametrize(("type", "dtype"), [("f32", torch.float32), ("f16", torch.float16)])
@pytest.mark.parametrize(("cols", "nm"), [(64, (2, 4)), (100, (1, 4)), (96, (4, 8))])
def test_float_weights_are_packed_as_the_dialect_packs_them(type, dtype, cols, nm):
    row = Row("nm", type, 5, cols, 1, nm)
    weight = torch.from_numpy(layers.random_weight(row)[0])
    values, indices = linear_nm.pack(weight, NM(*nm), dtype)
    ours = arrays(layers.sparse(row))
    np.testing.assert_array_equal(ours["values"], values)
    np.testing.assert_array_equal(ours["indices"], indices)

    row = Row("bitmask", type, 5, cols, 1, sparsity=0.3)
    packed = linear_bitmask.pack(torch.from_numpy(layers.random_weight(row)[0]), dtype)
    ours = arrays(layers.sparse(row))
    for name, wanted in zip(("values", "mask", "row_start"), packed, strict=True):
        np.testing.assert_array_equal(ours[name], wanted)


def test_the_node_names_its_weights_in_the_order_of_the_op():
    made = {
        (format, type): layers.sparse(Row(format, type, 4, 128, 1, group=64)).nodes[0]
        for format in ("nm", "bitmask")
        for type in ("f32", "i8", "i4")
    }
    assert {key: (node.op_type, *node.input[1:]) for key, node in made.items()} == {
        ("nm", "f32"): ("linear_nm", "values", "indices"),
        ("nm", "i8"): ("linear_nm_int8", "values", "indices", "scales"),
        ("nm", "i4"): ("linear_nm_int4", "values", "indices", "scales"),
        ("bitmask", "f32"): ("linear_bitmask", "values", "mask", "row_start"),
        ("bitmask", "i8"): ("linear_bitmask_int8", "values", "mask", "row_start", "scales"),
        ("bitmask", "i4"): ("linear_bitmask_int4", "values", "mask", "row_start", "scales"),
    }
    attributes = {attribute.name: attribute.i for attribute in made["nm", "i4"].attribute}
    assert attributes == {"n": 2, "m": 4, "group": 64, "in_features": 128}
    assert {attribute.name for attribute in made["bitmask", "i4"].attribute} == {"group", "in_features"}
    assert {attribute.name for attribute in made["nm", "i8"].attribute} == {"n", "m"}


def test_few_tokens_cycle_through_the_weights_asked_for_and_many_do_not():
    assert Work(1, 4096, 4096, 2, 200).layers(35_651_584) == 6
    assert Work(16, 576, 576, 2, 200).layers(100_000) == 2000
    assert Work(256, 4096, 4096, 2, 200).layers(35_651_584) == 1
    assert Work(17, 4096, 4096, 2, 200).layers(10**9) == 1


def test_ours_runs_before_every_opponent():
    order = []

    def contestant(name: str, seconds: float):
        return lambda: order.append(name) or seconds

    times, pairs = alternate(contestant("ours", 1.0), {"a": contestant("a", 2.0), "b": contestant("b", 3.0)}, 0.0)
    assert order[:6] == ["ours", "a", "b"] * 2  # warm up
    assert order[6:] == ["ours", "a", "ours", "b"] * 5
    assert times == [1.0] * 10
    assert pairs == {"a": [(1.0, 2.0)] * 5, "b": [(1.0, 3.0)] * 5}


@pytest.mark.parametrize("type", ["f32", "bf16", "f16", "i8", "i4"])
def test_a_kernel_that_computes_something_else_is_not_timed(type):
    row = Row("nm", type, 64, 256, 20, group=128)
    x = np.random.default_rng(1).standard_normal((20, 256), np.float32)
    weight = decoded(row) if type in ("i8", "i4") else layers.random_weight(row)[0]
    y = x @ weight.T
    check(row, x, y)
    for wrong in (np.zeros_like(y), -y, np.roll(y, 1, axis=1), y * np.nan):
        with pytest.raises(RuntimeError, match=f"2:4 {type}.*, M = 20: the kernel's result is off by"):
            check(row, x, wrong)


def test_requirements_say_pass_fail_stretch_and_not_measured():
    row = Row("nm", "f32", 4096, 4096, 1)
    wanted = [line for line in required([(4096, 4096)]) if line.row == row]
    assert [(line.against, line.required) for line in wanted] == [("floor", 0.8), ("dense", 2.0), ("deepsparse", 2.0)]
    result = Result(row, 500.0, 490.0, 9, 35_651_584, 70.0, 300.0, 425.0, 0.85, {"dense": Against(1300.0, 2.6)})
    records = report.requirement_records(wanted, [result])
    assert [record["pass"] for record in records] == [True, True, None]
    assert [line[-1] for line in report.requirement_table(records)[1:]] == ["pass", "stretch", "not measured"]
    failing = report.requirement_records(wanted[:1], [Result(row, 1, 1, 9, 1, 1, 1, 1, 0.79, {})])
    assert report.requirement_table(failing)[1][-1] == "FAIL"


def test_the_tool_measures_every_row_against_every_opponent(tmp_path):
    printed = run_tool(
        *("--shape", "64x128", "--tokens", "1", "32", "--seconds", "0.01", "--megabytes", "0.2", "--threads", "1")
    )
    assert printed["threads"] == 1
    assert printed["isa"] in ("amx", "avx512bf16", "avx512vnni", "avx512", "avx2", "portable")
    maker, *numbers = printed["processor"].split(", ")
    assert maker == this_machine().key["processor"]
    said = Path("/proc/cpuinfo").read_text()
    assert all(re.search(rf"^(cpu )?{name}\s*:\s*{value}$", said, re.M) for name, value in map(str.split, numbers))
    assert set(printed["features"]) <= set(Path("/proc/cpuinfo").read_text().split())
    assert (printed["isa"] == "amx") <= ("amx_int8" in printed["features"])
    (tmp_path / "saved.json").write_text(json.dumps(printed))
    tool = [sys.executable, "-P", str(TOOLS / "bench_kernels.py")]
    table = subprocess.run([*tool, "--read", str(tmp_path / "saved.json")], capture_output=True, text=True, check=True)
    title, _, head, _, *lines = table.stdout.strip().splitlines()
    assert title.startswith(printed["processor"])
    assert head.endswith("| against dense | against int8 | against int4-32 | against int4-128 |")
    assert len(lines) == len(printed["results"])
    rows = printed["results"]
    assert [(row["format"], row["tokens"]) for row in rows] == [
        ("nm", 1),
        ("bitmask", 1),
        ("nm", 32),
        ("bitmask", 32),
    ]
    for row in rows:
        assert (row["rows"], row["cols"], row["type"]) == (64, 128, "f32")
        assert row["runs"] >= 5
        for name in ("us", "best_us", "bandwidth_gb_s", "peak_gflop_s", "floor_us", "fraction_of_floor"):
            assert row[name] > 0, name
        assert set(row["against"]) == {"dense", "int8", "int4-32", "int4-128"}
        assert all(there["us"] > 0 and there["speedup"] > 0 for there in row["against"].values())
    assert rows[0]["weight_bytes"] == 64 * (64 * 4 + 16)


def test_the_tool_times_packing():
    printed = run_tool(*("--pack", "--shape", "64x128", "--gigabytes", "0.0001", "--type", "all", "--threads", "1"))
    assert [line["kernel"] for line in printed["packing"]] == [
        f"{pattern} {type}"
        for pattern in ("2:4", "bitmask 50%")
        for type in ("f32", "bf16", "f16", "i8", "i4 group 32")
    ]
    assert all(line["seconds"] > 0 and line["bytes"] == 98304 for line in printed["packing"])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--rows", "required", "--type", "f32"], "--type has no effect with --rows"),
        (["--pack", "--tokens", "3"], "--tokens has no effect with --pack"),
        (["--gigabytes", "2"], "--gigabytes needs --pack"),
        (["--against", "deepsparse"], "--against deepsparse and --deepsparse PYTHON need each other"),
        (["--shape", "64x127"], "every K a multiple of M; got 2:4"),
        (["--shape", "64"], "--shape must be NxK and --nm N:M, got 64 and 2:4"),
    ],
)
def test_the_tool_refuses(options, why, capsys):
    with pytest.raises(SystemExit) as refused:
        parse(options)
    assert refused.value.code == 2
    assert why in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as refused:
        parse(["--plot", "x.png"])
    assert refused.value.code == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err
