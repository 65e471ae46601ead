"""The command, ended by SIGKILL around a rename or removal: what is there is old, new or plainly none."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from families import WIDE
from onnx_models import dense, mlp, saved
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime.session import open_session

HERE = Path(__file__).parent
DONE, REFUSED, NOT_BUILT = 0, 2, 3
OLD, NEW = "1:4", "2:4"
RANDOM = r"(?<=\.)[0-9a-z_]{8}(?=\.(partial|old)\b)|(?<=/tmp)[0-9a-z_]{8}|(?<=safetensors\.)\d+$|(?<=json\.)\d+$"
"""What is another in every run in the names of files that are under way."""


@dataclass(frozen=True)
class Case:
    """A command, which is run in an empty folder.

    Attributes:
        source: what is compiled.
        out: what OUT is called.
        model: the ONNX file that is written.
        report: the report.
        flags: others.
        code: how it ends where nobody kills it.
    """

    source: str
    out: str
    model: str
    report: str
    flags: tuple[str, ...] = ()
    code: int = DONE

    def command(self, nm: str, *, overwrite: bool) -> list[str]:
        more = ["--overwrite"] if overwrite else []
        return [self.source, "--nm", nm, "--quiet", "-o", self.out, *self.flags, *more]


IMAGES = ("--calibration-inputs", "../../inputs/images")
CASES = {
    "file": Case("../../inputs/given.onnx", "m.onnx", "m.onnx", "m.onnx.report.json"),
    "onnx folder": Case("../../inputs/given.onnx", "m/", "m/model.onnx", "m/report.json"),
    "folder": Case("../../inputs/vit", "m/", "m/model.onnx", "m/report.json", IMAGES),
    "plan": Case("../../inputs/vit", "m.plan", "m.trt.onnx", "m.plan.report.json", IMAGES, NOT_BUILT),
    "checkpoint": Case("../../inputs/vit", "m.onnx", "m.onnx", "m.onnx.report.json", (*IMAGES, "--checkpoint", "kept")),
}


class Command:
    """Runs it in processes that a warm one forks."""

    def __init__(self, library):
        self.server = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "warm_command.py")],
            env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments, folder, step=0, *, before=False):
        """How it ended (an exit code, or minus a signal), the steps it made, what it printed."""
        wanted = {"arguments": arguments, "folder": str(folder), "step": step, "before": before}
        self.server.stdin.write(json.dumps(wanted) + "\n")
        self.server.stdin.flush()
        done = json.loads(self.server.stdout.readline())
        return os.waitstatus_to_exitcode(done["status"]), done["steps"], done["said"]

    def close(self):
        self.server.stdin.close()
        self.server.stdout.close()
        assert self.server.wait() == 0


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    library = tmp_path_factory.mktemp("library") / "kill_at_step.so"
    build = ["cc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", library, HERE / "kill_at_step.c", "-ldl"]
    subprocess.run(build, check=True)
    found = Command(library)
    yield found
    found.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with ``inputs`` beside the folders that each case makes; the command runs two levels below it."""
    base = tmp_path_factory.mktemp("killed")
    inputs = base / "inputs"
    (inputs / "images").mkdir(parents=True)
    saved(mlp(dense(64, 64, 1), dense(64, 32, 2)), inputs, "given.onnx")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**{**WIDE, "num_hidden_layers": 1}, image_size=32, patch_size=8)
    transformers.ViTForImageClassification(config).save_pretrained(inputs / "vit")
    pixels = np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32)
    np.savez(inputs / "images" / "a.npz", pixel_values=pixels)
    return base


def answers(model):
    """What a model says; None where none is there, or one that does not open."""
    try:
        session = open_session(model, threads=1)
    except InputError:
        return None
    feed = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else 2 for size in value.shape]
        kind = np.float16 if value.type == "tensor(float16)" else np.float32
        feed[value.name] = np.random.default_rng(1).standard_normal(shape, np.float32).astype(kind)
    return session.run(None, feed)[0]


def files(folder):
    """Every file below a folder with a digest: names without what is random in them, reports without their times."""
    found = {}
    for file in folder.rglob("*"):
        name = re.sub(RANDOM, "*", str(file.relative_to(folder)))
        if file.name.endswith("report.json"):
            found[name] = pattern_of(file)
        else:
            found[name] = "" if file.is_dir() else hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def pattern_of(report):
    """What a report says was pruned to."""
    try:
        return json.loads(report.read_text())["settings"]["pattern"]
    except ValueError:
        return "cut off"


class Killings:
    """One case, over an older result or over none."""

    def __init__(self, case: Case, command: Command, folder: Path, *, older: bool):
        self.case, self.command, self.older, self.work = case, command, older, folder / "work"
        self.before = folder / "before"
        self.before.mkdir(parents=True)
        (self.before / "letters.txt").write_text("dear")
        self.answers, self.files = {None: None}, {}
        if older:
            self.keep(OLD, self.before)
        shutil.copytree(self.before, self.work)
        self.steps = self.keep(NEW, self.work)
        self.repeated: dict[frozenset[tuple[str, str]], None] = {}

    def keep(self, nm, folder):
        """Run undisturbed, and keep what is there then; returns the steps."""
        code, steps, said = self.command.run(self.case.command(nm, overwrite=nm == NEW and self.older), folder)
        assert code == self.case.code, said
        self.answers[nm], self.files[nm] = answers(folder / self.case.model), files(folder)
        assert self.answers[nm] is not None
        assert all(
            not np.allclose(value, self.answers[nm]) for key, value in self.answers.items() if key not in (None, nm)
        )
        return steps

    def kill(self, step: int, *, before: bool) -> str | None:
        """Run to that step, look at what is there, run once more; returns what was there: OLD, NEW or None."""
        shutil.rmtree(self.work)
        shutil.copytree(self.before, self.work)
        arguments = self.case.command(NEW, overwrite=self.older)
        code, _, said = self.command.run(arguments, self.work, step, before=before)
        assert code == -signal.SIGKILL, said
        state, there = self.state(), files(self.work)
        if (key := frozenset(there.items())) not in self.repeated:
            self.repeated[key] = None
            code, _, said = self.command.run(arguments, self.work)
            there = files(self.work)
            if code == REFUSED and not self.older:  # all of it is there, and the checkpoint stays until a run is done
                assert "exists already" in said
                there = {name: digest for name, digest in there.items() if not name.startswith("kept")}
            else:
                assert code == self.case.code, said
            assert there == self.files[NEW]
        return state

    def state(self) -> str | None:
        """Which result is there; what describes a model must describe this one."""
        said = answers(self.work / self.case.model)
        if said is None:
            return None
        (state,) = (nm for nm in (OLD, NEW) if np.array_equal(said, self.answers.get(nm)))
        for name, digest in files(self.work).items():
            if not re.search(r"\.(partial|old)\b|^kept|\.data$", name):
                assert self.files[state].get(name) == digest, name
        return state


def at_the_result(step: str) -> bool:
    """Whether a step changes what is beside the folder of the run, which is called ``.partial``."""
    return any(".partial" not in path for path in step.split("\t")[1:])


def without(name: str) -> set[None]:
    """For a moment an older folder is gone and the new one not there: two folders do not change places in one step."""
    return {None} if "folder" in name else set()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["file", "onnx folder"])
def test_killed_after_every_step_at_the_place_of_the_result(name, command, base):
    it = Killings(CASES[name], command, base / f"{name}, quick", older=True)
    states = [it.kill(step, before=False) for step, said in enumerate(it.steps, 1) if at_the_result(said)]
    assert {OLD, NEW} <= {*states} <= {OLD, NEW, *without(name)}
    assert len(states) >= 3


EVERY_STEP = bool(os.environ.get("SPARSIFY_EVERY_STEP"))
"""Whether every step of every case is killed before and after (`make kills`, most of an hour), or a few of some."""


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True], ids=["nothing there", "an older one there"])
@pytest.mark.parametrize("name", CASES)
def test_killed_around_every_step(name, older, command, base):
    if not (EVERY_STEP or (older and name in ("folder", "checkpoint"))):
        pytest.skip("make kills runs it")
    it = Killings(CASES[name], command, base / f"{name}, {older}", older=older)
    steps = [n for n, said in enumerate(it.steps, 1) if EVERY_STEP or at_the_result(said) or n % 16 == 0]
    states = [it.kill(step, before=before) for step in steps for before in ((False, True) if EVERY_STEP else (False,))]
    first = OLD if older else None
    assert ({first, NEW} if EVERY_STEP else {NEW}) <= {*states} <= {first, NEW, *without(name)}
    print(f"{len(states)} kills, {len(it.repeated)} kinds of ruin: {Counter(states)}")  # noqa: T201
