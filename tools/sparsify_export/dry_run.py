"""``--dry-run``: what can be had from a model on this machine, predicted in seconds to minutes; nothing is pruned."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from .budget import Group, told_mix
from .budgeted import Subject, Weighed, weigh
from .calibrate.budget import frontier, totals
from .calibrate.search import Scale, pick, predicted
from .calibration_data import batches_for, calibration_text, example_for
from .objective import output_of
from .passes.frontend.load import load
from .passes.frontend.trace import trace
from .passes.fx.canonical import canonicalise
from .passes.fx.partition import partition
from .passes.outputs import Output
from .settings import Budget, Console, Settings
from .stages import Stages

POINTS = 9
"""Of the frontier, from the least damage to the least time."""


@dataclass(frozen=True)
class Point:
    """What is predicted of one choice.

    Attributes:
        name: of the choice.
        ms: of the workload; 0 where nothing is timed.
        speedup: over the dense float32 file.
        size: bytes of the file, over the dense one's.
        damage: nats a token, or squared error over the squared norm of the output.
        pruned: how many linears are pruned.
    """

    name: str
    ms: float
    speedup: float
    size: float
    damage: float
    pruned: int


@dataclass(frozen=True)
class Frontier:
    """The prediction.

    Attributes:
        workload: what the times are of.
        output: what the damage is of.
        dense: the dense float32 file, measured.
        uniform: one form for all linears that can have it.
        mixed: from the least damage to the least time; each with the least damage within its time.
        chosen: what the budget would choose; None without one.
        reached: whether that is within the budget.
    """

    workload: str
    output: Output
    dense: Point
    uniform: tuple[Point, ...]
    mixed: tuple[Point, ...]
    chosen: Point | None
    reached: bool


def predict(source: str, settings: Settings, *, trust_remote_code: bool, console: Console) -> Frontier:
    """Load and look at a model, time what its linears can be, and predict what that comes to.

    Args:
        source: Hugging Face folder, hub id or ``.gguf`` file.
        settings: with a recipe and a budget, whose workload is timed.
        trust_remote_code: run Python code that comes with the checkpoint.
        console: where to tell what happens.

    Raises:
        InputError: the model cannot run the workload, or no linear can have another form.
    """
    budget, stages = settings.budget, Stages()
    assert budget is not None
    console.progress("loading", 0, 0)
    pretrained = load(source, trust_remote_code=trust_remote_code)
    windows, _ = calibration_text(pretrained, settings, stages, console)
    console.progress("tracing", 0, 0)
    example = example_for(settings)
    traced = trace(pretrained, example)
    canonicalise(traced.program)
    parts = partition(traced.program)
    batches = batches_for(traced, pretrained, settings, windows)
    params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
    output = output_of(traced, pretrained)
    model = Subject(pretrained, traced, parts, params, batches, output, lambda: trace(pretrained, example))
    with tempfile.TemporaryDirectory(prefix="sparsify-export-") as folder:
        weighed = weigh(model, settings, Path(folder), console)
    return _frontier(weighed, budget, output)


def _frontier(weighed: Weighed, budget: Budget, output: Output) -> Frontier:
    groups, options = weighed.groups, [group.options for group in weighed.groups]
    first = [0] * len(groups)
    scale = Scale(1.0, weighed.dense.nbytes - totals(options, first).nbytes, weighed.dense.ms)

    def point(name: str, picks: Sequence[int]) -> Point:
        ms, nbytes = predicted(options, picks, scale)
        pruned = sum(
            len(group.paths) for group, at in zip(groups, picks, strict=True) if group.forms[at].pattern is not None
        )
        timed = weighed.dense.ms > 0
        return Point(
            name,
            ms if timed else 0.0,
            scale.dense_ms / ms if timed else 1.0,
            nbytes / weighed.dense.nbytes,
            totals(options, picks).damage,
            pruned,
        )

    mixed = [point(told_mix(groups, picks), picks) for picks in frontier(options, POINTS)]
    chosen, reached = None, True
    if budget.speedup or budget.size or budget.loss:
        picks, reached = pick(options, budget.goal, scale, weighed.dense.nbytes)
        chosen = point(told_mix(groups, picks), picks)
    return Frontier(
        str(budget.workload),
        output,
        point("dense fp32", first),
        tuple(point(f"all {name}", picks) for name, picks in _uniform(groups)),
        tuple(each for each in mixed if each.ms < scale.dense_ms),
        chosen,
        reached,
    )


def _uniform(groups: Sequence[Group]) -> list[tuple[str, list[int]]]:
    """Every form that all groups can have, in all of them."""
    shared = [form for form in groups[0].forms if not form.dense and all(form in group.forms for group in groups)]
    return [(str(form), [group.forms.index(form) for group in groups]) for form in shared]


def render(found: Frontier) -> Lines:
    """The prediction as a table, and in a sentence whether pruning pays."""
    loss = "perplexity" if found.output == "logits" else "squared error"
    table = Table("choice", found.workload, "speed-up", "bytes", loss, title="Predicted, before any update of weights")
    table.title_justify = "left"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    rows = [(found.dense, False), *((each, True) for each in found.uniform)]
    for each, _ in rows:
        _row(table, each, found.output)
    table.add_section()
    for each in found.mixed:
        _row(table, each, found.output)
    if found.chosen is not None:
        table.add_section()
        _row(table, found.chosen, found.output, "for the budget: " if found.reached else "nearest to the budget: ")
    return Lines(table, Text(verdict(found)))


def verdict(found: Frontier) -> str:
    """Whether pruning pays on this machine, as predicted."""
    if not found.mixed:
        return "Nothing is predicted to be faster than dense float32 here."
    with_zeros = [each for each in found.mixed if each.pruned]
    if not with_zeros:
        return "Pruning is predicted not to pay here: at every speed dense weights, quantised or not, do less damage."
    slowest = min(each.speedup for each in with_zeros)
    return f"Pruning is predicted to pay from {slowest:.2f}x on; below that dense weights do less damage."


def _row(table: Table, each: Point, output: Output, prefix: str = "") -> None:
    grown = f"+{100 * math.expm1(min(each.damage, 50.0)):.3g} %" if output == "logits" else f"{each.damage:.3g}"
    ms = f"{each.ms:.2f} ms" if each.ms else "-"
    table.add_row(prefix + each.name, ms, f"{each.speedup:.2f}x", f"{each.size:.3f}", grown)
