"""Benchmarks: which rows run, how pairs are compared, and what the report says."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime import benchmark
from sparsify_export.runtime.benchmark import bench, compare_kernels, render
from sparsify_export.runtime.session import open_session

IMAGES = "g (float[batch, 3, 4, 4] pixel_values) => (float[batch, 3, 4, 4] y) { y = Relu (pixel_values) }"
TEXT = (
    "g (int64[b, s] input_ids, int64[b, s] attention_mask) => (int64[b, s] y) { y = Add (input_ids, attention_mask) }"
)

# Positions up to 128, as a model with a learned position table has them.
LIMITED = """g (int64[b, s] input_ids) => (int64[b, s] y)
<int64[1] zero = {0}, int64[1] one = {1}>
{
    length = Shape <start = 1> (input_ids)
    position = Slice (table, zero, length, one)
    y = Add (input_ids, position)
}"""


# A decoder beside its encoder's output, as other tools write it; the lengths it saw are its outputs.
DECODER = """g (int64[b, s] input_ids, float[b, e, 4] encoder_hidden_states, float[b, 2, past, 4] cache)
  => (int64[1] s_, int64[1] e_, int64[1] past_)
{
    s_ = Shape <start = 1> (input_ids)
    e_ = Shape <start = 1, end = 2> (encoder_hidden_states)
    past_ = Shape <start = 2, end = 3> (cache)
}"""
OPEN_IMAGES = "g (float[b, 3, height, width] pixels) => (int64[4] y) { y = Shape (pixels) }"


def text_of(table):
    return [str(cell) for column in table.columns for cell in column._cells]


def test_a_causal_model_against_itself(tiny):
    report = bench(tiny.path, tiny.path, repeats=3, threads=1)
    assert [r.name for r in report.rows] == ["prefill 16", "prefill 128", "prefill 512", "decode 64", "decode 1024"]
    assert all(0 < r.model.p50 <= r.model.p90 and r.against and r.ratio and r.runs == 3 for r in report.rows)
    data = tiny.path.with_name("model.onnx.data")
    assert report.model.file_bytes == tiny.path.stat().st_size + data.stat().st_size
    assert report.model.sparse_ops == {"linear_nm": 1, "linear_bitmask": 1}
    assert 0 < report.model.resident_bytes < 100 << 20
    assert json.loads(report.to_json())["rows"][3]["name"] == "decode 64"
    table = render(report)
    assert "1 linear_nm, 1 linear_bitmask; threads: 1" in table.caption
    assert next(c for c in text_of(table) if c.endswith("x")) == f"{report.rows[0].ratio:.2f}x"


def test_a_model_of_images(onnx_file):
    report = bench(onnx_file(IMAGES), repeats=2)
    assert [(r.name, r.against, r.ratio) for r in report.rows] == [("batch 1", None, None)]
    assert report.model.sparse_ops == {}
    assert "sparse ops run: none; threads: as ONNX Runtime decides" in render(report).caption


def test_a_text_encoder(onnx_file):
    report = bench(onnx_file(TEXT), repeats=1, threads=1)
    assert [r.name for r in report.rows] == ["prefill 16", "prefill 128", "prefill 512"]


def test_inputs_are_made_as_long_as_their_row_says_each_by_its_own_axes(onnx_file):
    workloads = benchmark._workloads(open_session(onnx_file(DECODER)))
    assert {name: [int(x[0]) for x in run()] for name, run in workloads.items()} == {
        f"prefill {m}": [m, m, 0] for m in (16, 128, 512)
    }
    workloads = benchmark._workloads(open_session(onnx_file(OPEN_IMAGES)))
    assert [run()[0].tolist() for run in workloads.values()] == [[1, 3, 224, 224]]
    fixed = TEXT.replace("[b, s]", "[1, 48]")
    assert list(benchmark._workloads(open_session(onnx_file(fixed)))) == ["prefill 48"]


def test_given_inputs_are_what_runs(onnx_file, tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    np.savez(folder / "a.npz", pixels=np.ones((2, 3, 8, 8), np.float32))
    np.savez(folder / "b.npz", pixels=np.ones((1, 3, 16, 4), np.float32))
    file = onnx_file(OPEN_IMAGES)
    names = ["1: pixels [2, 3, 8, 8]", "2: pixels [1, 3, 16, 4]"]
    workloads = benchmark._workloads(open_session(file), folder)
    assert {name: run()[0].tolist() for name, run in workloads.items()} == dict(
        zip(names, ([2, 3, 8, 8], [1, 3, 16, 4]), strict=True)
    )
    assert [r.name for r in bench(file, file, inputs=folder, repeats=1).rows] == names
    np.savez(folder / "c.npz", other=np.ones(3))
    with pytest.raises(InputError, match=r"c\.npz lacks pixels; it holds other"):
        bench(file, inputs=folder, repeats=1)


def test_a_model_that_runs_on_nothing_made_up_asks_for_inputs(onnx_file):
    odd = "g (float[b, n] x) => (float[b, k] y) { y = MatMul (x, w) }"
    with pytest.raises(InputError, match=r"cannot run .*dimension mismatch; --inputs FOLDER gives"):
        bench(onnx_file(odd, w=np.ones((7, 2), np.float32)), repeats=1)


def test_nothing_is_imported_from_the_folder_the_user_stands_in(onnx_file, tmp_path, monkeypatch):
    (tmp_path / "psutil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    bench(onnx_file(IMAGES), repeats=1)
    assert not (tmp_path / "was_run").exists()


def test_no_python_is_started_without_that():
    """``-P`` or ``-I`` stands behind every ``sys.executable`` in what we ship."""
    for path in Path(__file__).parents[2].glob("[cprt][au]*/**/*.py"):
        if "tests" in path.parts:
            continue
        for call in re.findall(r"sys\.executable,? *(.*)", path.read_text()):
            assert call.startswith(('"-P"', '"-I"')), f"{path}: {call}"


def test_a_row_that_cannot_run_is_skipped_with_its_reason(onnx_file):
    report = bench(onnx_file(LIMITED, table=np.zeros((1, 128), np.int64)), repeats=1)
    assert [r.name for r in report.rows] == ["prefill 16", "prefill 128"]
    assert report.skipped[0].startswith("prefill 512: ")


def test_kernels_against_functions(tiny, onnx_file):
    rows = compare_kernels(tiny.path, repeats=2)
    assert [r.name for r in rows] == ["prefill 128", "decode 64"]
    assert all(r.ratio is not None and r.runs == 2 for r in rows)
    assert [r.name for r in compare_kernels(onnx_file(IMAGES), repeats=1)] == ["batch 1"]
    assert compare_kernels(onnx_file(LIMITED, table=np.zeros((1, 100), np.int64))) == ()


def test_refuses(tiny, onnx_file, tmp_path):
    images = onnx_file(IMAGES)
    with pytest.raises(InputError, match="take different inputs"):
        bench(tiny.path, images, repeats=1)
    with pytest.raises(InputError, match="at least 1 run, got 0"):
        bench(images, repeats=0)
    with pytest.raises(InputError, match=r"gone\.onnx does not exist"):
        bench(tmp_path / "gone.onnx")
    images.write_bytes(b"hello")
    with pytest.raises(InputError, match=r"^cannot run .*other\.onnx: cannot open .*other\.onnx: .*Protobuf parsing"):
        bench(images)


def test_pairs_run_in_turns_and_slow_rows_end_early():
    order = []
    times = benchmark._alternate([lambda: order.append("a"), lambda: order.append("b")], 3, 10.0)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert times.shape == (3, 2)
    assert len(benchmark._alternate([lambda: time.sleep(0.01)], 100, 0.0)) == benchmark.AT_LEAST


def test_the_ratio_is_the_median_of_pairs():
    row = benchmark._row("x", np.array([[1.0, 3.0], [10.0, 20.0], [2.0, 2.0]]))
    assert (row.ratio, row.model.p50, row.against.p50) == (2.0, 2.0, 3.0)
    assert row.model.p90 == pytest.approx(8.4)
