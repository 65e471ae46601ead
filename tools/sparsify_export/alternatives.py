"""``--alternatives``: what else the same model could be on this machine, and whether anything simpler is better."""

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from .budget import Choice
from .calibrate.patterns import NM
from .evaluation import perplexity_of
from .passes.dialect.storage import FP32
from .passes.form import Form
from .passes.frontend.load import Pretrained
from .passes.recipe import Quantise
from .runtime.evaluate import onnx_logits
from .runtime.session import CausalSession, open_session
from .runtime.stock import stock_int4, stock_int8
from .runtime.trial import size_of, timed
from .runtime.workload import Workload
from .settings import SILENT, Console, Settings

log = logging.getLogger(__name__)

MOST = 3
"""Uniform recipes that a mix is compared with: those of the forms that most of its linears have."""
STOCK = {"dense int8, ONNX Runtime's": stock_int8, "dense int4, ONNX Runtime's": stock_int4}
FASTER = 0.05
"""By what part times must differ to be told apart: repeated runs differ by less."""
CLOSER = 0.005
"""The same of perplexities: what the order of sums changes is far less, what another text changes far more."""


@dataclass(frozen=True)
class Alternative:
    """One file.

    Attributes:
        name: of it.
        ms: of the workload, measured in turns with the dense float32 file; None where it was not made.
        speedup: over that.
        nbytes: of the file and its data.
        perplexity: on the text of ``--eval``; None without one.
        failed: why it was not made; "" where it was.
    """

    name: str
    ms: float | None
    speedup: float | None
    nbytes: int | None
    perplexity: float | None
    failed: str = ""


@dataclass(frozen=True)
class Compared:
    """The table.

    Attributes:
        workload: what was timed.
        result: the file that was compiled.
        others: what it is compared with.
    """

    workload: str
    result: Alternative
    others: tuple[Alternative, ...]

    @property
    def verdict(self) -> str:
        """Whether anything in the table is better, in a sentence."""
        return _verdict(self.result, [each for each in self.others if not each.failed])

    def plain(self) -> dict[str, Any]:
        """As JSON-able values, for the report."""
        rows = [asdict(each) for each in (self.result, *self.others)]
        return {"workload": self.workload, "rows": rows, "verdict": self.verdict}


def compare(
    pretrained: Pretrained,
    result: Path,
    perplexity: float | None,
    settings: Settings,
    choice: Choice | None,
    compile_to: Callable[[str, Settings], object],
    console: Console = SILENT,
) -> Compared:
    """Make the alternatives in a folder of their own, and measure all of them.

    Args:
        pretrained: the model, for its tokenizer.
        result: the file that was compiled.
        perplexity: of it; None where none was measured.
        settings: what it was compiled with.
        choice: of the budget, if there was one.
        compile_to: compiles the model to a file.
        console: where to tell what happens.

    Raises:
        InputError: the model cannot run the workload.
    """
    workload = workload_of(pretrained, settings)
    with tempfile.TemporaryDirectory(prefix=f".{result.name}.", dir=result.parent.parent) as folder:
        dense = Path(folder) / "dense.onnx"
        console.progress("writing the dense model", 0, 0)
        compile_to(str(dense), _plain(settings))

        def row(name: str, file: Path) -> Alternative:
            _, ms, speedup = timed(file, dense, workload)
            found = perplexity if file == result else _perplexity(file, pretrained, settings, console)
            return Alternative(name, ms, speedup, size_of(file), found)

        own, others = row("this file", result), [row("dense fp32", dense)]
        for name, quantise in STOCK.items():
            console.progress(f"making {name}", 0, 0)
            file = Path(folder) / f"{quantise.__name__}.onnx"
            try:
                quantise(dense, file)
                others.append(row(name, file))
            except Exception as error:  # quantisers and ONNX Runtime raise whatever they like
                log.warning("%s", name, exc_info=True)
                said = " ".join(str(error).split())[:200]
                others.append(Alternative(name, None, None, None, None, said or type(error).__name__))
        for form in uniform(settings, choice):
            console.progress(f"compiling to {form} throughout", 0, 0)
            file = Path(folder) / f"{len(others)}.onnx"
            compile_to(str(file), of_form(settings, form))
            others.append(row(f"all {form}", file))
    return Compared(str(workload), own, tuple(others))


def _plain(settings: Settings) -> Settings:
    """Nothing pruned."""
    return replace(settings, recipe=None, budget=None, storage=FP32, lower_for=None, evaluate=None, alternatives=False)


def _perplexity(file: Path, pretrained: Pretrained, settings: Settings, console: Console) -> float | None:
    if settings.evaluate is None:
        return None
    logits = onnx_logits(CausalSession(open_session(file)))
    return perplexity_of(logits, pretrained, settings, console).perplexity


def workload_of(pretrained: Pretrained, settings: Settings) -> Workload:
    """What is timed: as the user says, else decoding, a prompt, or whatever the model takes."""
    asked = settings.workload or (settings.budget.workload if settings.budget else None)
    if asked is not None:
        return asked
    if pretrained.inputs[0] != "input_ids":
        return Workload(0)
    return Workload(1, 64) if pretrained.kind == "causal" else Workload(128)


def uniform(settings: Settings, choice: Choice | None) -> list[Form]:
    """The pruned forms that a mix is compared with, each for all linears; none where the result is one itself."""
    if choice is None:
        return []
    assert settings.recipe is not None
    if settings.budget is not None and settings.budget.pattern:
        return [Form(settings.recipe.pattern, settings.storage)]
    counts = Counter(form for _, form in choice.forms if form.pattern is not None)
    return [form for form, _ in counts.most_common(MOST)]


def of_form(settings: Settings, form: Form) -> Settings:
    """The same recipe, for one form of all linears."""
    recipe = settings.recipe
    assert recipe is not None
    assert form.pattern is not None
    method = recipe.quantise.method if recipe.quantise else "rtn"
    same = replace(
        recipe,
        pattern=form.pattern,
        permute=recipe.permute if isinstance(form.pattern, NM) else "none",
        quantise=Quantise(form.storage, method) if form.storage.quantised else None,
    )
    return replace(settings, recipe=same, storage=form.storage, budget=None, evaluate=None, alternatives=False)


def render(compared: Mapping[str, Any]) -> Table:
    """The table that the command line shows, from what the report holds."""
    table = Table("model", compared["workload"], "speed-up", "bytes", "perplexity", title="Alternatives")
    table.title_justify, table.caption, table.caption_justify = "left", compared["verdict"], "left"
    for column in table.columns[1:]:
        column.justify = "right"
    for each in compared["rows"]:
        if each["failed"]:
            table.add_row(each["name"], "not made", "", "", each["failed"])
            continue
        loss = "-" if each["perplexity"] is None else f"{each['perplexity']:.2f}"
        size = f"{each['nbytes'] / 1e6:.1f} MB"
        table.add_row(each["name"], f"{each['ms']:.2f} ms", f"{each['speedup']:.2f}x", size, loss)
    return table


def _verdict(result: Alternative, others: Sequence[Alternative]) -> str:
    assert result.ms is not None
    faster = [each for each in others if each.ms is not None and each.ms < result.ms * (1 - FASTER)]
    if result.perplexity is None:
        if not faster:
            return "Nothing in the table is faster; what it costs was not measured, for which --eval wants a text."
        first = min(faster, key=lambda each: each.ms or 0.0)
        return f"{_name(first)} is faster; what either costs was not measured, for which --eval wants a text."
    better = [each for each in others if _is_better(each, result)]
    if better:
        best = min(better, key=lambda each: (each.perplexity or 0.0, each.ms or 0.0))
        return f"{_name(best)} is better here: {_told(best, result)}."
    close = [each for each in others if each.ms is not None and each.ms <= result.ms * (1 + FASTER)]
    if not close:
        return "Nothing in the table is as fast."
    nearest = min(close, key=lambda each: each.perplexity or 0.0)
    if nearest.perplexity is not None and nearest.perplexity <= result.perplexity * (1 + CLOSER):
        return f"{_name(nearest)} is as good here: {_told(nearest, result)}."
    return "Nothing in the table is as fast and loses less."


def _is_better(other: Alternative, result: Alternative) -> bool:
    """As fast and closer, or as close and faster; both told apart from noise."""
    if other.ms is None or other.perplexity is None or result.ms is None or result.perplexity is None:
        return False
    as_fast, faster = other.ms <= result.ms * (1 + FASTER), other.ms < result.ms * (1 - FASTER)
    as_close = other.perplexity <= result.perplexity * (1 + CLOSER)
    closer = other.perplexity < result.perplexity * (1 - CLOSER)
    return (as_fast and closer) or (as_close and faster)


def _told(other: Alternative, result: Alternative) -> str:
    return (
        f"{other.ms:.2f} ms at a perplexity of {other.perplexity:.2f}, this file {result.ms:.2f} ms at "
        f"{result.perplexity:.2f}"
    )


def _name(each: Alternative) -> str:
    return f"{each.name[0].upper()}{each.name[1:]}"
