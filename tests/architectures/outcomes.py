"""What the command makes of a tiny random model of each entry of the list."""

import contextlib
import inspect
import io
import json
import logging
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsify_export.calibration_data import probes_of
from sparsify_export.cli import main
from sparsify_export.passes.errors import InputError, VerificationError
from sparsify_export.passes.frontend.load import describe
from sparsify_export.passes.frontend.trace import trace
from sparsify_export.passes.fx.canonical import canonicalise
from sparsify_export.passes.fx.partition import partition
from sparsify_export.runtime.published import ask
from sparsify_export.runtime.verify import expect
from sparsify_export.settings import Settings

from .listed import Entry
from .tiny import save_inputs, save_text, save_tokenizer, shapes_of, tiny_model

PRUNED = ["--nm", "2:4", "--quiet"]
SHORT = ["--samples", "4", "--seq-len", "32"]


@dataclass(frozen=True)
class Outcome:
    """What became of an entry.

    Attributes:
        result: ``compiled`` and verified, ``refused`` in a sentence, a ``fault`` of ours, or ``unequal``.
        said: the sentence, or the last frames of a fault.
        share: of the weights of linears in the file's repeated layers, how much was pruned; 0 where nothing compiled.
        seconds: how long the command took.
    """

    result: Literal["compiled", "refused", "fault", "unequal"]
    said: str
    share: float
    seconds: float


def outcome(entry: Entry, folder: Path) -> Outcome:
    """Save a random model of the entry and run the command on it."""
    model = tiny_model(entry.kind, entry.model, entry.changes)
    source = folder / "model"
    model.save_pretrained(source)
    taken = inspect.signature(model.forward).parameters
    beside = {"pixel_values", "input_features", "input_values"} & taken.keys()
    if "input_ids" in taken and (model.can_generate() or not beside) and not entry.inputs:
        save_tokenizer(source)
        given = ["--calibration", str(save_text(folder)), *SHORT]
    else:
        given = ["--calibration-inputs", str(save_inputs(folder / "inputs", entry.inputs or shapes_of(model)))]
    del model
    faults = _Faults()
    log = logging.getLogger("sparsify_export")
    log.addHandler(faults)
    said = io.StringIO()
    begin = time.perf_counter()
    try:
        with contextlib.redirect_stderr(said):
            code = main([str(source), *given, *PRUNED, "-o", str(folder / "x.onnx")])
    finally:
        log.removeHandler(faults)
    seconds = time.perf_counter() - begin
    if code == 0:
        return Outcome("compiled", "", _share(folder / "x.onnx.report.json"), seconds)
    sentence = (said.getvalue().strip().splitlines() or [""])[-1].removeprefix("sparsify-export: ")
    if faults.seen:
        return Outcome("fault", f"{sentence}\n{faults.seen[-1]}", 0.0, seconds)
    return Outcome("unequal" if code == 4 else "refused", sentence, 0.0, seconds)


def graph_outcome(entry: Entry) -> Outcome:
    """The same without pruning and without a file: the model's graph is cut into blocks and compared with the model."""
    begin = time.perf_counter()
    try:
        model = tiny_model(entry.kind, entry.model, entry.changes)
        pretrained = describe(model)
        traced = trace(pretrained)
        canonicalise(traced.program)
        parts = partition(traced.program)
        params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
        probes = probes_of(traced, pretrained, [], None, Settings(None))
        expect(parts, params, [ask(model, traced, probe) for probe in probes])
    except InputError as error:
        return Outcome("refused", str(error), 0.0, time.perf_counter() - begin)
    except VerificationError as error:
        return Outcome("unequal", str(error), 0.0, time.perf_counter() - begin)
    return Outcome("compiled", "", 0.0, time.perf_counter() - begin)


def _share(report: Path) -> float:
    """The share of the weights of all linears that was lowered to sparse ops, of those in the repeated layers."""
    linears = json.loads(report.read_text())["linears"]
    inside = [x for x in linears if x["reason"] != "outside the repeated layers"]
    size = sum(x["dense_bytes"] for x in inside)
    return sum(x["dense_bytes"] for x in inside if not x["reason"]) / size if size else 0.0


class _Faults(logging.Handler):
    """Keeps what was logged with a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            frames = traceback.extract_tb(record.exc_info[2])[-6:]
            lines = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
            self.seen.append(f"{record.exc_info[1]!r}\n  " + "\n  ".join(lines))
