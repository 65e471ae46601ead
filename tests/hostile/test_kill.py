"""A run that is killed at any of its renames and removals: what is there is old, new or plainly incomplete."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.onnx.protos import data_files
from sparsify_export.passes.onnx.write import write_proto
from sparsify_export.report import Report
from sparsify_export.target import Target

OUTPUTS = ["m.onnx", "folder", "m.plan"]


class Killed(BaseException):
    """The power is gone."""


class Power:
    """Cuts the power before the n-th step that changes a folder; after that no step happens, cleaning up included."""

    def __init__(self, monkeypatch, steps):
        self.left = steps
        for owner, name in [
            *((Path, name) for name in ("replace", "rename", "unlink", "rmdir", "write_text")),
            (shutil, "rmtree"),
        ]:
            monkeypatch.setattr(owner, name, self.cut(getattr(owner, name)))

    def cut(self, step):
        def tried(*args, **kwargs):
            if self.left == 0:
                raise Killed
            self.left -= 1
            return step(*args, **kwargs)

        return tried


def model(value):
    weight = onnx.numpy_helper.from_array(np.full((32, 32), value, np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 32])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 32])],
        [weight],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)


def report(value):
    return Report(f"{value}", {}, (), (), (), None, (), (), None, {}, 0, 0, 0)


def build(target, value):
    """What a compilation does, as far as files go."""
    target.open()
    write_proto(model(value), target.model, base=target.stage, check=False)
    if target.out.suffix == ".plan":
        (target.stage / "build_plan.py").write_text("script")
        (target.stage / "m.trt.json").write_text(f"{value}")
        target.stage.joinpath(target.out.name).write_text(f"{value}")
    (target.stage / "build").write_text("") if target.folder else None


def publish(out, value, *, overwrite):
    target = Target.check(str(out), overwrite=overwrite)
    with target.guarded():
        build(target, value)
        target.finish(None, report(value))


def seen(out):
    """The value of the model that is there, None where none is, and what else there is must belong to it."""
    file = {".onnx": out, "": out / "model.onnx", ".plan": out.with_suffix(".trt.onnx")}[out.suffix]
    if not file.exists():
        return None
    loaded = onnx.numpy_helper.to_array(onnx.load(file).graph.initializer[0])
    assert len(np.unique(loaded)) == 1
    value = int(loaded[0, 0])
    told = out / "report.json" if not out.suffix else out.with_name(f"{out.name}.report.json")
    if told.exists():
        assert json.loads(told.read_text())["source"] == str(value)
    for beside in (out, out.with_suffix(".trt.json")):
        if beside.suffix in (".plan", ".json") and beside.exists():
            assert beside.read_text() == str(value)
    return value


def below(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


@pytest.fixture
def clean(tmp_path_factory):
    """What an undisturbed run leaves."""

    def made(name, value):
        folder = tmp_path_factory.mktemp("clean")
        publish(folder / name, value, overwrite=False)
        return below(folder)

    return made


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("older", [False, True], ids=["nothing there", "an older one there"])
def test_killed_at_every_step(tmp_path, monkeypatch, clean, name, older):
    wanted, killed, states = clean(name, 2), 0, set()
    for steps in range(100):
        folder = tmp_path / str(steps)
        folder.mkdir()
        out = folder / name
        if older:
            publish(out, 1, overwrite=False)
        target = Target.check(str(out), overwrite=older)
        build(target, 2)
        with monkeypatch.context() as patched:
            Power(patched, steps)
            try:
                with target.guarded():
                    target.finish(None, report(2))
            except Killed:
                killed += 1
            else:
                break
            finally:
                target._unlock()  # as the kernel does when a process is gone
        states.add(seen(out))
        assert seen(out) in ((1, 2, None) if older else (2, None))
        publish(out, 2, overwrite=True)  # and the same command can be given again
        assert seen(out) == 2
        assert below(folder) == wanted
    assert killed == steps >= 3
    assert states >= ({1, 2} if older else {2, None})


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_dead_run_is_cleared_and_one_that_lives_is_not(tmp_path, name, clean):
    out = tmp_path / name
    dead, alive = (Target.check(str(out), overwrite=True) for _ in range(2))
    for target in (dead, alive):
        build(target, 1)
    dead._unlock()
    publish(out, 2, overwrite=True)
    assert not dead.stage.exists()
    assert alive.model.is_file()
    alive.finish(None, report(1))  # the last one wins, and is whole
    assert seen(out) == 1
    assert below(tmp_path) == clean(name, 1)


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_came_to_be_there_meanwhile_is_not_replaced(tmp_path, name):
    first, second = (Target.check(str(tmp_path / name), overwrite=False) for _ in range(2))
    build(first, 1)
    build(second, 2)
    first.finish(None, report(1))
    with pytest.raises(InputError, match="exists already"), second.guarded():
        second.finish(None, report(2))
    assert seen(tmp_path / name) == 1
    assert not second.stage.exists()


@pytest.mark.parametrize("beside", ["m.onnx.report.json", "m.onnx"])
def test_files_of_the_user_stay_without_overwrite(tmp_path, beside):
    (tmp_path / beside).write_text("precious")
    with pytest.raises(InputError, match="exists already; remove it or give --overwrite"):
        publish(tmp_path / "m.onnx", 1, overwrite=False)
    assert (tmp_path / beside).read_text() == "precious"


def test_files_that_only_look_like_ours_stay_with_overwrite(tmp_path):
    publish(tmp_path / "m.onnx", 1, overwrite=False)
    told = json.loads((tmp_path / "m.onnx.report.json").read_text())
    mine = ["letters.txt", "m.onnx.data", "m.onnx.0123456789ab.data"]
    for name in mine:
        (tmp_path / name).write_text("precious")
    told["files"] += ["letters.txt", "../outside.txt", "/etc/passwd", "m.onnx.data"]  # but not the last of the three
    (tmp_path / "m.onnx.report.json").write_text(json.dumps(told))
    publish(tmp_path / "m.onnx", 2, overwrite=True)
    assert all((tmp_path / name).read_text() == "precious" for name in mine)
    assert len(list(tmp_path.glob("m.onnx.*.data"))) == 2


def test_a_file_put_into_our_folder_keeps_it_from_being_replaced(tmp_path):
    publish(tmp_path / "out", 1, overwrite=False)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    held = below(tmp_path)
    with pytest.raises(InputError, match=r"notes\.txt was not written by sparsify-export, so --overwrite will not"):
        publish(tmp_path / "out", 2, overwrite=True)
    assert below(tmp_path) == held
    assert seen(tmp_path / "out") == 1


def test_a_folder_with_any_report_is_not_ours(tmp_path):
    (tmp_path / "out").mkdir()
    for content in ("{}", "[]", '{"files": 3}', '{"files": [1]}', "[" * 100_000, "\ufffd"):
        (tmp_path / "out" / "report.json").write_text(content)
        with pytest.raises(InputError, match="was not written by sparsify-export"):
            publish(tmp_path / "out", 2, overwrite=True)


def test_failed_artifacts_never_take_the_place_of_anything(tmp_path):
    (tmp_path / "m.onnx.failed").mkdir()
    (tmp_path / "m.onnx.failed" / "letters.txt").write_text("dear")
    target = Target.check(str(tmp_path / "m.onnx"), overwrite=False)
    build(target, 1)
    assert target._keep_failed() == tmp_path / "m.onnx.failed-2"
    assert (tmp_path / "m.onnx.failed" / "letters.txt").read_text() == "dear"


def test_the_old_data_goes_only_where_nobody_there_reads_it(tmp_path):
    out = tmp_path / "m.onnx"
    publish(out, 1, overwrite=False)
    (same,) = data_files(out)
    publish(out, 1, overwrite=True)  # the same content, so the same name
    assert same.is_file()
    publish(out, 2, overwrite=True)
    assert not same.exists()
    assert len(os.listdir(tmp_path)) == 3
