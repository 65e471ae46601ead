"""Run ONNX models in a process of its own, so that a crash of ONNX Runtime ends that process and not the command.

This file is both sides. The child is started as a file and imports nothing of ours, so it is there in a moment.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

Arrays: TypeAlias = dict[str, Any]
"""By the names of a model's inputs or outputs."""

NUMBERS = tuple(f"tensor({kind})" for kind in ("float", "float16", "double", "int64", "int32", "int16", "int8", "bool"))
NUMBERS += tuple(f"tensor(uint{bits})" for bits in (64, 32, 16, 8))
"""The types of outputs that are brought back."""

DIED = "ONNX Runtime died of"


@dataclass(frozen=True)
class Job:
    """One model, run on every feed.

    Attributes:
        model: its file.
        library: a library of custom ops; "" for none.
        optimise: with all of ONNX Runtime's optimisations, as a user opens it.
    """

    model: str
    library: str
    optimise: bool = False


def run_all(jobs: Sequence[Job], feeds: Sequence[Mapping[str, Any]], folder: Path) -> list[list[Arrays | str]]:
    """Run every job on every feed; what goes wrong comes back as a sentence.

    Models are opened with ONNX Runtime's basic optimisations unless a job says otherwise: those beyond turn legal
    models into some that it cannot run, or die of (1.32: a large model of which parts are float64). Constants are not
    folded, which would keep an unpacked or float64 copy of every weight.

    Args:
        jobs: what to run, one after another in one process; after a crash the rest in another.
        feeds: the inputs.
        folder: an empty folder for what goes back and forth.

    Returns:
        For every job, for every feed: the outputs that are numbers, or why there are none.
    """
    for index, feed in enumerate(feeds):
        np.savez(folder / f"feed{index}.npz", *feed.values())
    (folder / "names.json").write_text(json.dumps([list(feed) for feed in feeds]))
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    for index in range(len(jobs)):
        if (folder / f"{index}.json").exists():
            continue
        command = [sys.executable, "-P", __file__, str(folder)]  # -P: no module of the current folder is imported
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            at = next(i for i in range(len(jobs)) if not (folder / f"{i}.json").exists())
            (folder / f"{at}.json").write_text(json.dumps([_death(done.returncode, done.stderr)] * len(feeds)))
    return [_results(folder, index, len(feeds)) for index in range(len(jobs))]


def kills(job: Job, folder: Path) -> str:
    """How the process ends that opens a model, if it does not end well; "" where it lives, whatever it says."""
    ((outcome,),) = run_all([job], [{}], folder)
    return outcome if isinstance(outcome, str) and outcome.startswith(DIED) else ""


def _death(code: int, said: str) -> str:
    if code < 0:
        return f"{DIED} signal {-code} ({signal.Signals(-code).name})"
    lines = said.strip().splitlines() or ["no word"]
    return f"ONNX Runtime ended with exit code {code}: {lines[-1]}"


def _results(folder: Path, job: int, feeds: int) -> list[Arrays | str]:
    results: list[Arrays | str] = []
    for feed, said in enumerate(json.loads((folder / f"{job}.json").read_text())):
        if isinstance(said, str):
            results.append(said)
            continue
        with np.load(folder / f"{job}.{feed}.npz") as file:
            results.append({name: file[f"arr_{i}"] for i, name in enumerate(said)})
    return results


def _serve(folder: Path) -> None:
    """The child: run every job that has no result yet, and note down the names of the outputs of each feed."""
    names = json.loads((folder / "names.json").read_text())
    for index, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        done = folder / f"{index}.json"
        if done.exists():
            continue
        said: list[Any] = []
        try:
            session = _open(Job(**job))
        except Exception as error:  # ONNX Runtime's exceptions have no common base class of their own
            said = [" ".join(str(error).split())] * len(names)
        else:
            for feed, inputs in enumerate(names):
                try:
                    said.append(_run(session, folder / f"feed{feed}.npz", inputs, folder / f"{index}.{feed}.npz"))
                except Exception as error:
                    said.append(" ".join(str(error).split()))
        done.write_text(json.dumps(said))


def _open(job: Job) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what is wrong arrives as an exception
    if not job.optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if job.library:
        options.register_custom_ops_library(job.library)
    return ort.InferenceSession(
        job.model, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )


def _run(session: Any, feed: Path, inputs: Sequence[str], out: Path) -> list[str]:
    wanted = {value.name for value in session.get_inputs()}
    with np.load(feed) as file:
        arrays = {name: file[f"arr_{i}"] for i, name in enumerate(inputs) if name in wanted}
    names = [output.name for output in session.get_outputs() if output.type in NUMBERS]
    np.savez(out, *session.run(names, arrays))
    return names


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
