"""Latency, size and memory of an exported file, alone or against another one, measured in turns."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from rich.table import Table

from ..passes.errors import InputError
from ..passes.mapped import give_back
from ..passes.onnx.protos import data_files
from .artifact import artifact_file, causal, open_artifact
from .feeds import make_feed, read_feeds
from .pieces import Piece, cut
from .session import CausalSession, open_session, sparse_runs
from .tensorrt.session import check_can_run, is_plan

log = logging.getLogger(__name__)

PREFILL = (16, 128, 512)
DECODE = (64, 1024)
ROWS = ("prefill 128", "decode 64", "batch 1")
"""What a result is compared by."""
WARM_UP = 2
AT_LEAST = 5  # runs of a row, however long it takes

Run: TypeAlias = Callable[[], object]
Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one file in one row: the median, and what 9 of 10 runs stay below."""

    p50: float
    p90: float


@dataclass(frozen=True)
class Row:
    """One workload.

    Attributes:
        name: ``prefill 128``: 128 tokens and an empty cache; ``decode 64``: one token and a cache of 64;
            ``batch 1`` for a model that does not take text; ``1: pixels [4, 3, 8, 8]`` for the first of given inputs.
        model: the file under test.
        against: the other file, or None.
        ratio: median over the pairs of runs of the other file's time over this one's, above 1 where the file
            under test is faster; None without another file.
        runs: how often each file ran, warm-up left out.
    """

    name: str
    model: Times
    against: Times | None
    ratio: float | None
    runs: int


@dataclass(frozen=True)
class Side:
    """One file.

    Attributes:
        path: the file.
        file_bytes: the model file and its external data.
        resident_bytes: growth of the resident memory of a fresh process between having imported ONNX Runtime and
            having run 16 tokens (or one batch): weights as they were loaded or touched in the mapped file, what
            ONNX Runtime repacked, and its buffers. For an engine, growth of the GPU's used memory instead.
        sparse_ops: how often each sparse op ran in that run, from ONNX Runtime's profile; empty for a dense file.
    """

    path: str
    file_bytes: int
    resident_bytes: int
    sparse_ops: dict[str, int]


@dataclass(frozen=True)
class BenchReport:
    """Everything a benchmark measured.

    Attributes:
        model: the file under test.
        against: the other file, or None.
        rows: the workloads that ran.
        skipped: workloads the model cannot run, each with the reason.
        threads: threads of an op, for both files; 0 means that ONNX Runtime decides.
    """

    model: Side
    against: Side | None
    rows: tuple[Row, ...]
    skipped: tuple[str, ...]
    threads: int

    def to_json(self) -> str:
        """The report as JSON, times in milliseconds and sizes in bytes."""
        return json.dumps(asdict(self), indent=2)


def bench(
    path: Path,
    against: Path | None = None,
    *,
    inputs: Path | None = None,
    repeats: int = 20,
    threads: int | None = None,
    row_seconds: float = 10.0,
    progress: Progress = lambda stage, done, total: None,
) -> BenchReport:
    """Measure ``path``, in turns with ``against``: both open at once, same threads, one run each after the other.

    Args:
        path: the file under test.
        against: the file to compare with; it must take the same inputs.
        inputs: a folder of ``.npz`` files with arrays named like the model's inputs, a row each; None makes them up.
        repeats: runs of each file and row.
        threads: threads of an op; None lets ONNX Runtime decide.
        row_seconds: a row ends early, though not before 5 runs, when it has taken so long.
        progress: told which row runs, how many are done, and how many there are.

    Raises:
        InputError: a file cannot be opened, the two take different inputs, or no row can run.
    """
    if repeats < 1:
        raise InputError(f"a benchmark wants at least 1 run, got {repeats}")
    paths = [path] if against is None else [path, against]
    for engine in filter(is_plan, paths):
        check_can_run(engine)
    sides = [_side(p, threads, inputs) for p in paths]
    workloads = [_workloads(open_artifact(p, threads=threads), inputs) for p in paths]
    if len({tuple(w) for w in workloads}) != 1:
        raise InputError(f"{path} and {against} take different inputs and cannot be compared")
    rows, skipped = _measure_rows(workloads, tuple(workloads[0]), repeats, row_seconds, progress)
    if not rows:
        raise InputError(f"{path} runs none of the workloads; the first says: {skipped[0]}")
    return BenchReport(sides[0], sides[1] if against else None, rows, skipped, threads or 0)


def compare_kernels(path: Path, *, repeats: int = 9, row_seconds: float = 5.0) -> tuple[Row, ...]:
    """Measure a file with our kernels in turns with the same file run by ONNX Runtime alone.

    Without the kernels the functions in the file unpack every weight once, while it is loaded, and dense products
    run: the same model on the same machine, dense. One prefill and one decode row are enough to see a gain or none.
    Of a large file each piece is measured by itself (pieces.py), and what is told is the sum.
    """
    if pieces := cut(path):
        return _compare_pieces(path, pieces, repeats, row_seconds)
    sides = [_workloads(open_session(path, kernels=kernels)) for kernels in (True, False)]
    names = tuple(name for name in ROWS if name in sides[0])
    return _measure_rows(sides, names, repeats, row_seconds, lambda stage, done, total: None)[0]


def _compare_pieces(path: Path, pieces: Sequence[Piece], repeats: int, seconds: float) -> tuple[Row, ...]:
    """`compare_kernels` of a file in pieces, whose inputs are what the pieces before it make."""
    rows = []
    for name, feed in _feeds(open_session(path)).items():
        try:
            rows.append(_row(name, _times_of_pieces(pieces, feed, repeats, seconds / len(pieces))))
        except Exception as error:  # ONNX Runtime's exceptions have no common base class of their own
            log.warning("%s in pieces: %s", name, error)
    return tuple(rows)


def _times_of_pieces(pieces: Sequence[Piece], feed: Mapping[str, Any], repeats: int, seconds: float) -> np.ndarray:
    """Times ``[repeats, 2]`` of a whole run in milliseconds, with kernels and without; a piece has so many seconds."""
    values = dict(feed)
    times: list[np.ndarray] = []
    for piece in pieces:
        own = {name: values[name] for name in piece.inputs}
        runs: list[Run] = [
            partial(piece.open(kernels=kernels).run, list(piece.outputs), own) for kernels in (True, False)
        ]
        for run in runs * WARM_UP:
            made: Any = run()
        values |= {name: x for name, x in zip(piece.outputs, made, strict=True) if name in piece.crossing}
        for name in piece.dead:
            values.pop(name, None)
        times.append(_alternate(runs, repeats, seconds))
        del runs, run, made, own
        give_back()
    total: np.ndarray = np.sum([each[: min(map(len, times))] for each in times], axis=0)
    return total


def compare_plans(path: Path, against: Path, *, repeats: int = 9) -> tuple[Row, ...]:
    """Measure an engine in turns with the one built without sparse tactics: one prefill and one decode row."""
    sides = [_workloads(open_artifact(file)) for file in (path, against)]
    names = tuple(name for name in ROWS if name in sides[0])
    return _measure_rows(sides, names, repeats, 5.0, lambda stage, done, total: None)[0]


def compare_files(path: Path, against: Path, feed: dict[str, Any], *, repeats: int = 9) -> tuple[Row, ...]:
    """Measure a file in turns with another one on the same inputs."""
    sessions = [open_session(file) for file in (path, against)]
    names = [i.name for i in sessions[0].get_inputs()]
    shape = ", ".join(f"{name} {list(feed[name].shape)}" for name in names[:1])
    sides: list[dict[str, Run]] = [{shape: partial(session.run, None, feed)} for session in sessions]
    return _measure_rows(sides, (shape,), repeats, 5.0, lambda stage, done, total: None)[0]


def render(report: BenchReport) -> Table:
    """The table that the command line shows."""
    table = Table("", "model p50", "p90", *(["against p50", "p90", "speedup"] if report.against else []))
    for row in report.rows:
        cells = [f"{row.model.p50:.2f} ms", f"{row.model.p90:.2f} ms"]
        if row.against is not None:
            cells += [f"{row.against.p50:.2f} ms", f"{row.against.p90:.2f} ms", f"{row.ratio:.2f}x"]
        table.add_row(row.name, *cells)
    table.add_section()
    for name, field in (("file", "file_bytes"), ("resident memory", "resident_bytes")):
        size = getattr(report.model, field)
        cells = [f"{size / 2**20:,.1f} MiB", ""]
        if report.against is not None:
            other = getattr(report.against, field)
            cells += [f"{other / 2**20:,.1f} MiB", "", f"{size / other:.2f} of it"]
        table.add_row(name, *cells)
    ops = ", ".join(f"{count} {op}" for op, count in report.model.sparse_ops.items()) or "none"
    table.caption = f"sparse ops run: {ops}; threads: {report.threads or 'as ONNX Runtime decides'}"
    if is_plan(Path(report.model.path)):
        table.caption = "memory is the GPU's; which layers are sparse says the report beside the engine"
    return table


def _measure_rows(
    sides: list[dict[str, Run]], names: tuple[str, ...], repeats: int, seconds: float, progress: Progress
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """Every workload on every side; those the model cannot run are named with what ONNX Runtime says."""
    rows, skipped = [], []
    for done, name in enumerate(names):
        progress(name, done, len(names))
        runs = [side[name] for side in sides]
        try:
            for run in runs * WARM_UP:
                run()
        except Exception as error:  # ONNX Runtime's exceptions have no common base class of their own
            skipped.append(f"{name}: {str(error).strip().splitlines()[0]}")
            continue
        rows.append(_row(name, _alternate(runs, repeats, seconds)))
    return tuple(rows), tuple(skipped)


def _alternate(runs: list[Run], repeats: int, seconds: float) -> np.ndarray:
    """Times ``[repeats, files]`` in milliseconds; every second pair runs in the other order, against drift."""
    times: list[list[float]] = []
    start = time.perf_counter()
    while len(times) < repeats and (len(times) < AT_LEAST or time.perf_counter() - start < seconds):
        pair = [0.0] * len(runs)
        order = range(len(runs)) if len(times) % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            begin = time.perf_counter()
            runs[index]()
            pair[index] = 1e3 * (time.perf_counter() - begin)
        times.append(pair)
    return np.array(times)


def _row(name: str, times: np.ndarray) -> Row:
    each = [Times(float(np.quantile(t, 0.5)), float(np.quantile(t, 0.9))) for t in times.T]
    if len(each) == 1:
        return Row(name, each[0], None, None, len(times))
    return Row(name, each[0], each[1], float(np.median(times[:, 1] / times[:, 0])), len(times))


def _workloads(session: Any, folder: Path | None = None) -> dict[str, Run]:
    """What can be run on this file, by name. What is made up is the same for every file."""
    inputs = {i.name: i for i in session.get_inputs()}
    if folder is not None:
        feeds = read_feeds(folder, session, {}, samples=None)
        first = next(iter(inputs))
        names = [f"{index}: {first} {list(feed[first].shape)}" for index, feed in enumerate(feeds, 1)]
        return {name: partial(session.run, None, feed) for name, feed in zip(names, feeds, strict=True)}
    if _is_causal(session):
        model = causal(session)
        prefill = {f"prefill {m}": _step(model, m, 0) for m in PREFILL}
        return prefill | {f"decode {past}": _step(model, 1, past) for past in DECODE}
    if "input_ids" in inputs:
        fixed = inputs["input_ids"].shape[-1]
        lengths = (fixed,) if isinstance(fixed, int) else PREFILL
        return {f"prefill {m}": _call(session, m) for m in lengths}
    return {"batch 1": _call(session, None)}


def _feeds(session: Any) -> dict[str, dict[str, Any]]:
    """The inputs of ``ROWS`` that a file has, as `_workloads` makes them up."""
    if _is_causal(session):
        model, past = causal(session), [i.name for i in session.get_inputs() if i.name.startswith("past_key_values.")]
        feeds = {}
        for name, tokens, length in (("prefill 128", 128, 0), ("decode 64", 1, 64)):
            ids, mask, cache = _tokens(model, tokens, length)
            feeds[name] = dict(zip(past, (x.numpy() for x in cache), strict=True))
            feeds[name] |= {"input_ids": ids, "attention_mask": mask}
        return feeds
    shape = next((i.shape for i in session.get_inputs() if i.name == "input_ids"), None)
    if shape is None:
        return {"batch 1": make_feed(session, {}, {}, seed=0, length=None)}
    return {} if isinstance(shape[-1], int) else {"prefill 128": make_feed(session, {}, {}, seed=0, length=128)}


def _is_causal(session: Any) -> bool:
    """Whether it decodes with a KV cache as what we write does. Other tools' decoders may want more than a cache."""
    names = [i.name for i in session.get_inputs()]
    past = [name for name in names if name.startswith("past_key_values.")]
    return bool(past) and set(names) - set(past) == {"input_ids", "attention_mask"}


def _step(causal: CausalSession, tokens: int, past: int) -> Run:
    given = _tokens(causal, tokens, past)
    return lambda: causal.run_only(*given)


def _tokens(causal: CausalSession, tokens: int, past: int) -> tuple[Any, Any, Any]:
    """Random token ids, a mask without padding and a random cache."""
    ids = np.random.default_rng(0).integers(causal.vocabulary, size=(1, tokens))
    return ids, np.ones((1, past + tokens), np.int64), causal.random_past(1, past)


def _call(session: Any, length: int | None) -> Run:
    """Run once: ones for integers (a token id, or "not padding"), normal random numbers for floats."""
    return partial(session.run, None, make_feed(session, {}, {}, seed=0, length=length))


def _side(path: Path, threads: int | None, inputs: Path | None) -> Side:
    """Size and memory of one file; the memory in a process of its own, where nothing else is."""
    file = artifact_file(path)
    # -P: without it Python would import from the folder the user stands in, which may be a downloaded model
    command = [sys.executable, "-P", "-m", __name__, str(file), str(threads or 0), *([str(inputs)] if inputs else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it died without a word"]
        ours = f"{InputError.__module__}.InputError: "
        hint = "" if inputs or lines[-1].startswith(ours) else "; --inputs FOLDER gives it arrays that it can run on"
        raise InputError(f"cannot run {path}: {lines[-1].removeprefix(ours)}{hint}")
    resident, ops = json.loads(done.stdout)
    beside = () if is_plan(file) else data_files(file)
    size = sum(part.stat().st_size for part in (file, *beside) if part.is_file())
    return Side(str(path), size, resident, ops)


def _measure(file: Path, threads: int | None, inputs: Path | None) -> tuple[int, dict[str, int]]:
    """Resident memory after the first workload, and the sparse ops in it; call in a fresh process."""
    if is_plan(file):
        return _measure_on_gpu(file, inputs), {}
    process = psutil.Process()
    before = process.memory_info().rss
    session = open_session(file, threads=threads)
    next(iter(_workloads(session, inputs).values()))()
    resident = process.memory_info().rss - before
    del session
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(file, threads=threads, profile=Path(folder) / "profile")
        next(iter(_workloads(session, inputs).values()))()
        return resident, sparse_runs(session)


def _measure_on_gpu(file: Path, inputs: Path | None) -> int:
    """Memory of the GPU that is in use after the first workload, and was not before."""
    before, _ = torch.cuda.mem_get_info()
    session = open_artifact(file)
    next(iter(_workloads(session, inputs).values()))()
    return before - torch.cuda.mem_get_info()[0]


if __name__ == "__main__":
    given = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    sys.stdout.write(json.dumps(_measure(Path(sys.argv[1]), int(sys.argv[2]) or None, given)) + os.linesep)
