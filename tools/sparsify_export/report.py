"""What was gained and what was lost: the report of a compilation, as JSON and as tables."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .alternatives import render as render_alternatives
from .html_report import NO_GAIN
from .passes.dialect import linear_codes
from .passes.frontend.trace import PREFIX
from .passes.fx.rewrite import Lowered
from .passes.onnx.protos import data_files
from .passes.recipe import BlockReport, DistilReport
from .passes.tables import Embedding
from .runtime.benchmark import Row
from .runtime.evaluate import Perplexity
from .runtime.exact import ExactAnswers
from .runtime.session import SPARSE_OPS
from .runtime.verify import Verified
from .stages import Stage


@dataclass(frozen=True)
class Evaluation:
    """The same windows and problems: the dense model in torch, the finished file in ONNX Runtime."""

    dense: Perplexity
    dense_answers: ExactAnswers
    result: Perplexity
    result_answers: ExactAnswers


@dataclass(frozen=True)
class LinearEntry:
    """One linear of the model.

    Attributes:
        path: module path.
        shape: ``[out_features, in_features]``.
        pattern: the pattern of its zeros, or None.
        op: what the file holds: one of the dialect's ops, ``MatMul``, or another op of an ONNX model given.
        reason: why it is no sparse op, or was not pruned, or what changed besides its weight; "" otherwise.
        sparsity: fraction of zeros, counted; None where it was not pruned here.
        retained_before: score kept by the mask with the channels in their original order.
        retained_after: score kept as pruned.
        dense_bytes: its weight in float32.
        stored_bytes: its weight in the file.
        error_before: relative error of its output with the original weights under the score's mask; None where no
            weights were updated. See ``passes.recipe.LinearReport``.
        error_after: the same with the weights as pruned.
        refused: why its update was not taken, or with more damping only; "" where all is well.
        directions: how many directions its inputs have been seen in; None where that is not known.
        quantiser: how it was quantised, or None.
        error_quantised: the same error with the weights as quantised; None where it was not measured.
    """

    path: str
    shape: tuple[int, int]
    pattern: str | None
    op: str
    reason: str
    sparsity: float | None
    retained_before: float | None
    retained_after: float | None
    dense_bytes: int
    stored_bytes: int
    error_before: float | None = None
    error_after: float | None = None
    refused: str = ""
    directions: int | None = None
    quantiser: str | None = None
    error_quantised: float | None = None

    @property
    def lowered(self) -> bool:
        """Whether the file holds a sparse op for it."""
        return self.op in SPARSE_OPS


@dataclass(frozen=True)
class Report:
    """Everything that is known about one compilation; see the fields of its parts.

    Attributes:
        source: the model.
        settings: what was asked for.
        linears: every linear of the model.
        blocks: path, error, folds and the fine-tuned halves of every block.
        verified: how the file was run, its error and the error allowed.
        evaluation: perplexity before and after, or None without ``--eval``.
        latency: milliseconds with our kernels, against the same file run by ONNX Runtime alone or, where an ONNX
            model was given, against that.
        stages: seconds and peak memory.
        machine: the machine whose figures decided what was lowered; None where every weight that gets smaller was.
        pruning_seconds: what pruning was spent on.
        file_bytes: the model and its data.
        dense_linear_bytes: all linears of the repeated layers in float32.
        stored_linear_bytes: the same as stored.
        given_bytes: the ONNX model that was given and its data; None for other sources.
        distilled: what training all blocks together made of the model's output: nothing where that was not asked for,
            and with joint quantisation first of the floats, then on the grid. The errors of blocks and of linears are
            those before it, ``error_quantised`` between the two is against the floats.
        embeddings: every embedding table, where they were to be stored as 8-bit codes.
        choice: what a budget left dense, with the figures it was chosen by and every choice that was measured; None
            without one.
        alternatives: what else the model could be, measured, and whether anything is better; None where not asked for.
        uncrossed: sliding windows, in tokens, that no text of verification was long enough to cross.
        engine: what is known about a TensorRT engine: its options, why it was not built, what is in it; None for ONNX.
        genai: why onnxruntime-genai cannot run the folder, "" where it can; None where no folder was written.
    """

    source: str
    settings: Mapping[str, Any]
    linears: tuple[LinearEntry, ...]
    blocks: tuple[Mapping[str, Any], ...]
    verified: tuple[Mapping[str, Any], ...]
    evaluation: Evaluation | None
    latency: tuple[Row, ...]
    stages: tuple[Stage, ...]
    machine: Mapping[str, Any] | None
    pruning_seconds: Mapping[str, float]
    file_bytes: int
    dense_linear_bytes: int
    stored_linear_bytes: int
    given_bytes: int | None = None
    distilled: tuple[DistilReport, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    uncrossed: tuple[int, ...] = ()
    choice: Mapping[str, Any] | None = None
    alternatives: Mapping[str, Any] | None = None
    engine: Mapping[str, Any] | None = None
    genai: str | None = None

    def save(self, path: Path, *, files: Sequence[str]) -> None:
        """Write the report as JSON, with the names of the files that were written; see ``publish.listed``."""
        said = {"written_by": "sparsify-export", "files": list(files), **asdict(self)}
        path.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def build_report(
    *,
    source: str,
    settings: Mapping[str, Any],
    blocks: Sequence[BlockReport],
    lowered: Sequence[Lowered],
    embeddings: Sequence[Embedding],
    verified: Sequence[Verified],
    evaluation: Evaluation | None,
    latency: Sequence[Row],
    stages: Sequence[Stage],
    machine: Mapping[str, Any] | None,
    pruning_seconds: Mapping[str, float],
    distilled: tuple[DistilReport, ...],
    model: Path,
    uncrossed: tuple[int, ...],
    choice: Mapping[str, Any] | None = None,
) -> Report:
    """Put together what the stages reported."""
    pruned = {linear.path: linear for block in blocks for linear in block.linears}
    linears = []
    for entry in lowered:
        linear = pruned.get(entry.linear.path)
        linears.append(
            LinearEntry(
                path=entry.linear.path,
                shape=(entry.linear.out_features, entry.linear.in_features),
                pattern=linear.pattern if linear else entry.pattern,
                op=entry.op,
                reason=(linear.reason if linear and linear.reason else entry.reason or _told_codes(entry)),
                sparsity=linear.sparsity if linear and linear.pattern else None,
                retained_before=linear.retained_before if linear else None,
                retained_after=linear.retained_after if linear else None,
                dense_bytes=entry.dense_bytes,
                stored_bytes=entry.stored_bytes,
                error_before=linear.error_before if linear else None,
                error_after=linear.error_after if linear else None,
                refused=linear.refused if linear else "",
                directions=linear.directions if linear else None,
                quantiser=linear.quantiser if linear else None,
                error_quantised=linear.error_quantised if linear else None,
            )
        )
    inside = [entry for entry in linears if entry.path in pruned] or [e for e in linears if e.lowered]
    return Report(
        source=source,
        settings=settings,
        linears=tuple(linears),
        blocks=tuple(_block(block) for block in blocks),
        verified=as_told(verified),
        evaluation=evaluation,
        latency=tuple(latency),
        stages=tuple(stages),
        machine=machine,
        pruning_seconds=dict(pruning_seconds),
        file_bytes=bytes_of(model),
        dense_linear_bytes=sum(entry.dense_bytes for entry in inside),
        stored_linear_bytes=sum(entry.stored_bytes for entry in inside),
        distilled=distilled,
        embeddings=tuple(embeddings),
        uncrossed=uncrossed,
        choice=choice,
    )


def as_told(verified: Sequence[Verified]) -> tuple[Mapping[str, Any], ...]:
    """Every way that a file was compared in, with its error and the error allowed."""
    return tuple({"how": v.how, "error": v.closeness.error, "allowed": v.closeness.budget} for v in verified)


def bytes_of(model: Path) -> int:
    """The size of a model file and its data."""
    return sum(file.stat().st_size for file in (model, *data_files(model)))


def render(report: Report) -> Group:
    """The report for a terminal: one line a block, every exception in full, the totals, and the proof."""
    parts: list[Any] = [_blocks(report)] if report.blocks else []
    if any(e.refused for e in report.linears):
        parts.append(_refused([e for e in report.linears if e.refused]))
    dense = [e for e in report.linears if not e.lowered]
    if dense and report.settings["ops"] == "sparse" and report.engine is None:
        parts.append(_left_dense(dense))
    if report.engine is not None:
        parts.append(_engine_linears(report.engine))
    parts.append(_totals(report))
    if report.alternatives is not None:
        parts.append(render_alternatives(report.alternatives))
    parts.append(_stages(report))
    return Group(*parts)


def _told_codes(entry: Lowered) -> str:
    """What the file holds for a weight that a budget quantised and did not prune; "" for others."""
    return f"dense, in {entry.attributes['bits']} bits" if entry.op == linear_codes.NAME else ""


def _blocks(report: Report) -> Table:
    table = Table(title="Pruned blocks", title_justify="left")
    updated = any(e.error_after is not None for e in report.linears)
    layers: tuple[str, ...] = ("masked", "updated") if updated else ()
    tuned = ("tuned",) if any(block["tuned"] for block in report.blocks) else ()
    names = {e.quantiser for e in report.linears if e.error_quantised is not None}
    layers += tuple(f"quantised ({name})" for name in names if name)
    for name in ("block", "linears", "pattern", "retained", "folded", "folds", *layers, *tuned, "error", "bytes"):
        table.add_column(name, justify="left" if name in ("block", "pattern") else "right", no_wrap=name == "block")
    for block in report.blocks:
        own = [e for e in report.linears if e.path.startswith(f"{block['path']}.") and e.sparsity is not None]
        if not own:
            continue
        weight = [e.shape[0] * e.shape[1] for e in own]
        before = sum((e.retained_before or 0) * w for e, w in zip(own, weight, strict=True)) / sum(weight)
        after = sum((e.retained_after or 0) * w for e, w in zip(own, weight, strict=True)) / sum(weight)
        stored = sum(e.stored_bytes for e in own) / sum(e.dense_bytes for e in own)
        table.add_row(
            block["path"].removeprefix(PREFIX),
            str(len(own)),
            ", ".join(sorted({e.pattern or "" for e in own})),
            f"{before:.3f}",
            f"{after:.3f}",
            str(len(block["folds"])),
            *([_mean_error(own, "error_before"), _mean_error(own, "error_after")] if updated else []),
            *([_mean_error(own, "error_quantised")] if any(names) else []),
            *([_gains(block["tuned"])] if tuned else []),
            f"{block['error']:.3f}",
            f"{stored:.3f}x",
        )
    return table


def _block(block: BlockReport) -> dict[str, Any]:
    tuned = [asdict(half) for half in block.tuned]
    return {"path": block.path, "error": block.error, "folds": [asdict(f) for f in block.folds], "tuned": tuned}


def _mean_error(linears: Sequence[LinearEntry], name: Literal["error_before", "error_after", "error_quantised"]) -> str:
    """The mean relative error of the outputs of a block's linears, squared, over those that were updated."""
    errors = [error for error in (getattr(entry, name) for entry in linears) if error is not None]
    return f"{sum(errors) / len(errors):.3f}" if errors else ""


def _gains(halves: Sequence[Mapping[str, Any]]) -> str:
    """What fine-tuning left of the loss of each half, on the batches it was not trained on."""
    return ", ".join(f"{half['after'] / half['before']:.2f}x" if half["before"] else "-" for half in halves)


def _refused(entries: Sequence[LinearEntry]) -> Table:
    """Every linear by its name: its error, under "updated" above, is that of the mask alone, or of more damping."""
    table = Table("linear", "its update", "masked", "updated", title="Updates that made a layer worse")
    table.title_justify, table.columns[0].overflow = "left", "fold"
    for entry in entries:
        errors = (_mean_error([entry], "error_before"), _mean_error([entry], "error_after"))
        table.add_row(entry.path, entry.refused, *errors)
    return table


def _left_dense(entries: Sequence[LinearEntry]) -> Table:
    reasons: dict[str, list[LinearEntry]] = {}
    for entry in entries:
        reasons.setdefault(entry.reason, []).append(entry)
    table = Table("left dense", "why", title="Linears left dense", title_justify="left")
    for reason, same in reasons.items():
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        table.add_row(f"{same[0].path} {list(same[0].shape)}{more}", reason)
    return table


def _engine_linears(engine: Mapping[str, Any]) -> Table:
    """Every kind of linear: its sizes, and whether TensorRT may and did take a sparse tactic."""
    built = not engine["not_built"]
    table = Table("linear", "K", "N", "pattern", "sparse tactic possible", *(["picked"] if built else []))
    table.title, table.title_justify = "Linears for TensorRT", "left"
    table.columns[0].overflow = "fold"  # a path cut short names no layer
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for linear in engine["linears"]:
        possible = f"{linear['eligible']}: {linear['reason']}" if linear["reason"] else linear["eligible"]
        picked = (f"{linear['picked']}: {linear['why']}",) if built else ()
        cells = (str(linear["k"]), str(linear["n"]), linear["pattern"] or "-", possible, *picked)
        kinds.setdefault(cells, []).append(linear["name"])
    for cells, names in kinds.items():
        table.add_row(names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), *cells)
    return table


def _engine_totals(engine: Mapping[str, Any], table: Table) -> None:
    sparse = [linear for linear in engine["linears"] if linear["pattern"] == "2:4"]
    counts = Counter(linear["eligible"] for linear in sparse)
    plugged = sum(linear["plugin"] != "" for linear in engine["linears"])
    if sparse or not plugged:
        table.add_row(
            "2:4 linears that may run sparse",
            f"{counts['yes']} of {len(sparse)} by shape, {counts['maybe']} maybe, {counts['no']} not",
        )
    if coded := sum(linear["bits"] == 8 for linear in engine["linears"]):
        said = f"{coded} of {len(engine['linears'])}; TensorRT may run them dense (NVIDIA/TensorRT#4694)"
        table.add_row("products of 8-bit codes", said)
    if plugged:
        table.add_row("linears that the plugin runs", f"{plugged} of {len(engine['linears'])}")
    if not engine["not_built"]:
        picked = Counter(linear["picked"] for linear in sparse if linear["eligible"] != "no")
        table.add_row("sparse tactics", f"{picked['yes']} picked, {picked['no']} not, {picked['unknown']} unknown")
        sizes = [engine["plan_bytes"], engine["dense_plan_bytes"]]
        against = "" if sizes[1] is None else f", without sparse tactics {_mb(sizes[1])}"
        table.add_row("engine", f"{_mb(sizes[0])}{against}, TensorRT {engine['tensorrt']}")


def _totals(report: Report) -> Table:
    table = Table("what", "figure", title="Result", title_justify="left")
    lowered = [e for e in report.linears if e.lowered]
    if report.engine is not None:
        _engine_totals(report.engine, table)
    else:
        table.add_row("linears lowered to sparse ops", f"{len(lowered)} of {len(report.linears)}")
    for note, count in Counter(e.reason for e in lowered if e.reason and report.given_bytes is not None).items():
        table.add_row(f"{count} of these", note)
    if report.dense_linear_bytes:
        ratio = report.stored_linear_bytes / report.dense_linear_bytes
        sizes = f"{_mb(report.stored_linear_bytes)} of {_mb(report.dense_linear_bytes)} dense fp32"
        gain = "" if ratio < 1 else ": no gain"
        name = "their weights" if report.engine is None else "weights as the engine gets them"
        table.add_row(name, f"{sizes} ({ratio:.3f}x{gain})")
    if (kept := _retained(report)) is not None:
        table.add_row("score kept", f"{kept:.3f} of that of the pruned weights")
    known = [(e.directions / e.shape[1], e) for e in report.linears if e.directions is not None]
    if known:
        _, worst = min(known, key=lambda pair: pair[0])
        table.add_row(
            "directions that calibration shows", f"{worst.directions} of {worst.shape[1]} for {worst.path}, the fewest"
        )
    if lowered and report.engine is None and report.settings["dtype"] in ("int8", "int4"):
        table.add_row("their activations", "quantised to 8 bits, each token by itself")
    for embedding in report.embeddings:
        table.add_row(f"table {embedding.path} {list(embedding.shape)}", _told_table(embedding))
    if report.machine is not None:
        table.add_row(
            "lowered where it is faster on", f"{report.machine['processor']}, {report.machine['threads']} threads"
        )
    given = "" if report.given_bytes is None else f", the model given {_mb(report.given_bytes)}"
    table.add_row("file", _mb(report.file_bytes) + given)
    against = "same file without our kernels" if report.given_bytes is None else "the model given"
    if report.engine is not None:
        against = "without sparse tactics"
    if report.choice is not None:
        _told_choice(report.choice, table)
    for row in report.latency:
        if row.against is not None and row.ratio is not None:
            gain = f"{row.ratio:.2f}x" if row.ratio >= NO_GAIN else f"{row.ratio:.2f}x: no gain"
            table.add_row(row.name, f"{row.model.p50:.1f} ms, {against} {row.against.p50:.1f} ms ({gain})")
    for name, loss in zip(("distilled", "distilled on the grid"), report.distilled, strict=False):
        moved = f", {loss.moved:.1%} of the kept weights moved" if loss.moved is not None else ""
        table.add_row(name, f"loss on held-out text {loss.before:.3f}, now {loss.after:.3f}{moved}")
    if report.evaluation:
        dense, result = report.evaluation.dense, report.evaluation.result
        where = f"{result.windows} windows of {result.window} tokens"
        table.add_row("perplexity", f"{result.perplexity:.2f}, dense {dense.perplexity:.2f} ({where})")
        answers = report.evaluation.result_answers
        table.add_row("exact answers", f"{answers}; dense: {report.evaluation.dense_answers}")
    for entry in report.verified:
        table.add_row(
            f"verified with {entry['how']}", f"max error {entry['error']:.2e}, allowed {entry['allowed']:.2e}"
        )
    if report.genai is not None:
        table.add_row("onnxruntime-genai", f"no: {report.genai}" if report.genai else "runs the folder as it is")
    if report.uncrossed:
        windows = ", ".join(map(str, report.uncrossed))
        table.add_row("not verified", f"texts longer than the sliding window of {windows} tokens")
    return table


def _told_choice(choice: Mapping[str, Any], table: Table) -> None:
    """What the budget was, what was chosen, and what it came to."""
    last, timed = choice["tries"][-1], choice["workload"] is not None
    measured, count = last["measured"], len(choice["tries"])
    met = f"{measured['speedup']:.3g}x, " if timed else ""
    table.add_row(
        f"budget: {choice['budget']}",
        f"{met}{measured['size']:.3f} of the bytes measured on a trial file, choice {count} of 3 at most",
    )
    table.add_row("chosen", last["mix"])
    table.add_row("damage estimated", f"{last['damage']:.3g} before the update (nats a token, or squared error)")
    if timed:
        table.add_row(
            choice["workload"],
            f"{measured['ms']:.2f} ms, {last['ms']:.2f} ms predicted; dense float32 {measured['dense_ms']:.2f} ms",
        )
    for loss in choice["losses"]:
        table.add_row("perplexity of the choice", f"grew by {100 * loss:.2f} %")


def _told_table(entry: Embedding) -> str:
    """How an embedding table is stored, or why it stays as it was."""
    if entry.reason:
        return f"{_mb(entry.dense_bytes)} of floats: {entry.reason}"
    sizes = f"{_mb(entry.stored_bytes)} of {_mb(entry.dense_bytes)}"
    return f"{sizes}: 8-bit codes, a scale a row, squared error {entry.error:.1e} of its squared norm"


def _retained(report: Report) -> float | None:
    """The mean over the weights that were pruned without blocks to tell about; None where there are none."""
    own = [e for e in report.linears if e.retained_after is not None and not report.blocks]
    weights = sum(e.shape[0] * e.shape[1] for e in own)
    return sum((e.retained_after or 0) * e.shape[0] * e.shape[1] for e in own) / weights if weights else None


def _stages(report: Report) -> Text:
    times = ", ".join(f"{s.name} {s.seconds:.1f} s ({_mb(s.peak_bytes)})" for s in report.stages)
    inside = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.pruning_seconds.items())
    text = f"time and peak memory: {times}"
    return Text(text + (f"\npruning: {inside}" if inside else ""))


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
