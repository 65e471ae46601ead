"""Files of a choice, written to be weighed and timed before any work goes into it.

Speed and size depend on what each linear is stored as, and on nothing else: weights are zeroed by magnitude and rounded
to nearest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..calibrate.masks import keep_mask
from ..calibrate.search import Measured
from ..passes.form import Form
from ..passes.frontend.trace import Traced
from ..passes.fx.canonical import canonicalise
from ..passes.fx.embeddings import quantise_embeddings
from ..passes.fx.rewrite import lower_linears
from ..passes.lower import to_onnx
from ..passes.mapped import mapped
from ..passes.onnx.protos import data_files
from .benchmark import compare_files
from .session import open_session
from .workload import Workload

REPEATS = 15


@dataclass
class Trials:
    """Trial files of one model.

    Attributes:
        traced: traces the model anew: writing a file changes the program.
        folder: where files are written; they are removed when they were measured, the dense one stays.
        workload: what is timed; None where nothing is.
        written: how many files there were.
    """

    traced: Callable[[], Traced]
    folder: Path
    workload: Workload | None
    written: int = field(default=0)

    def dense(self) -> Measured:
        """Write the dense model, and time it.

        Raises:
            InputError: the model cannot run the workload.
        """
        write(self.traced(), self._dense, {})
        nbytes = size_of(self._dense)
        if self.workload is None:
            return Measured(nbytes, 1.0)
        ms = timed(self._dense, self._dense, self.workload)[1]
        return Measured(nbytes, 1.0, ms, ms)

    def measure(self, forms: Mapping[str, Form]) -> Measured:
        """Write the model with some weights in other forms, by key, and compare it with the dense one."""
        file = self.folder / f"try{self.written}.onnx"
        self.written += 1
        write(self.traced(), file, forms)
        nbytes = size_of(file)
        try:
            if self.workload is None:
                return Measured(nbytes, nbytes / size_of(self._dense))
            dense_ms, ms, speedup = timed(file, self._dense, self.workload)
            return Measured(nbytes, nbytes / size_of(self._dense), dense_ms, ms, speedup)
        finally:
            for each in (*data_files(file), file):
                each.unlink()

    @property
    def _dense(self) -> Path:
        return self.folder / "dense.onnx"


def write(traced: Traced, path: Path, forms: Mapping[str, Form]) -> None:
    """Write a model with some weights in other forms, by key: what was pruned and how does not matter here."""
    canonicalise(traced.program)
    state = traced.program.state_dict
    forms = {key: form for key, form in forms.items() if not form.dense}
    patterns = {key: form.pattern for key, form in forms.items() if form.pattern is not None}
    for key, pattern in patterns.items():
        weight = state[key].detach()
        kept = mapped(weight * keep_mask(weight.abs(), pattern, "row"))
        state[key] = torch.nn.Parameter(kept, requires_grad=False)
    lower_linears(traced.program, forms=forms, patterns=patterns, sparse=bool(forms))
    if any(form.storage.quantised for form in forms.values()):
        quantise_embeddings(traced.program)
    to_onnx(traced, path, metadata={})


def timed(file: Path, dense: Path, workload: Workload) -> tuple[float, float, float]:
    """Milliseconds of the dense file and of another in turns, and the speed-up."""
    (row,) = compare_files(file, dense, workload.feed(open_session(dense)), repeats=REPEATS)
    assert row.against is not None
    assert row.ratio is not None
    return row.against.p50, row.model.p50, row.ratio


def size_of(file: Path) -> int:
    """Bytes of a model file and its data."""
    return sum(part.stat().st_size for part in (file, *data_files(file)))
