"""One table of ways to prune: perplexity, exact answers, block error, what was learned, time and memory.

    python -P tools/compare_recipes.py MODEL --calibration FILE --text FILE --out FOLDER
        [--methods wanda,ria,...] [--patterns 2:4,0.5,2:4+int4,...] [--samples 32] [--seq-len 1024]
    python -P tools/compare_recipes.py MODEL ... --vary ria-power --values 0,0.5,1 --methods ria --patterns 2:4

Every cell is a process of its own, so its peak memory is its own. It prunes the traced model as the compiler does,
exports nothing, and evaluates the pruned graph in torch. A finished cell is a line of FOLDER/cells.jsonl and is not run
again; FOLDER/table.json, table.csv and table.png are written from all lines. A cell that fails is reported at the end
and tried again by the next run.
"""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cyclopts import App
from rich.console import Console
from rich.table import Table
from sparsify_export.compile import as_stored, cache_pairs, parse_pattern, store
from sparsify_export.passes.dialect.storage import FP32, Storage
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import read_windows, token_batches
from sparsify_export.passes.frontend.load import Pretrained, load
from sparsify_export.passes.frontend.trace import Traced, trace
from sparsify_export.passes.fx.canonical import canonicalise
from sparsify_export.passes.fx.partition import Partition, partition
from sparsify_export.passes.fx.rewrite import lower_linears, stored_weights
from sparsify_export.passes.fx.run import live_after, run_part_rounded, start
from sparsify_export.passes.pipeline import prune
from sparsify_export.passes.recipe import BlockReport, Recipe
from sparsify_export.runtime.evaluate import Logits, perplexity
from sparsify_export.runtime.exact import exact_answers
from sparsify_export.stages import Stages

DENSE = "dense"
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"score": "magnitude", "permute": "none"},
    "wanda": {"score": "wanda", "permute": "none"},
    "ria": {"score": "ria", "permute": "none"},
    "ria+fold": {"score": "ria"},
    "sparsegpt": {"update": "sparsegpt", "mask_from": "update", "permute": "none"},
    "sparsegpt+fold": {"update": "sparsegpt", "mask_from": "update"},
    "admm+fold": {"update": "admm", "mask_from": "update"},
    "cg+fold": {"update": "cg"},
    "balanced": {"update": "admm-cg", "mask_from": "update"},
}
"""A method is what it changes of a ``Recipe``; a new one is a line here."""

PATTERNS = ("2:4", "4:8", "0.5", "0.6", "0.7", "2:4+int4", "0.5+int4")
VARIED: dict[str, tuple[str, type, tuple[float, ...]]] = {
    "samples": ("", int, (4, 8, 16, 32, 64, 128)),
    "ria-power": ("ria_power", float, (0.0, 0.25, 0.5, 0.75, 1.0)),
}
"""What can be varied: the field of ``Recipe`` ("" for a setting of the cell), its type, and the usual values."""

COLUMNS = {
    "method": "method", "pattern": "pattern", "varied": "varied", "perplexity": "perplexity", "dln": "dln",
    "copying": "copying", "brackets": "brackets", "arithmetic": "arithmetic", "error": "block error",
    "zeros": "zeros", "learned": "learned", "seconds": "seconds", "peak_bytes": "peak memory",
}  # fmt: skip

app = App()


@dataclass(frozen=True)
class Cell:
    """One entry of the table; everything that decides its figures.

    Attributes:
        model: as the compiler takes it.
        calibration: text file.
        text: text file to evaluate on.
        method: a key of ``METHODS``, or ``dense``.
        pattern: as ``--nm`` or ``--sparsity``, with ``+int4`` or ``+int8`` behind it for quantised weights.
        samples: calibration windows.
        seq_len: tokens in one.
        window: tokens in an evaluation window.
        windows: evaluation windows at most; None for all of the text.
        varied: name and value of what is varied, or "".
        value: that value.
    """

    model: str
    calibration: str
    text: str
    method: str
    pattern: str
    samples: int
    seq_len: int
    window: int
    windows: int | None
    varied: str = ""
    value: float | None = None


@app.default
def main(
    model: str,
    *,
    calibration: Path,
    text: Path,
    out: Path,
    methods: str = ",".join(METHODS),
    patterns: str = ",".join(PATTERNS),
    samples: int = 32,
    seq_len: int = 1024,
    window: int = 1024,
    windows: int | None = 24,
    vary: str | None = None,
    values: str | None = None,
) -> int:
    """Run the cells that are not finished, and write the table.

    Args:
        model: Hugging Face folder, hub id or .gguf file of a causal language model.
        calibration: text file to calibrate on.
        text: text file to evaluate on.
        out: folder for cells.jsonl, table.json, table.csv and table.png.
        methods: names, with commas between them.
        patterns: the same.
        samples: calibration windows.
        seq_len: tokens in one.
        window: tokens in an evaluation window.
        windows: evaluation windows at most.
        vary: samples or ria-power; every method and pattern is run with every value.
        values: of what is varied, with commas between them.
    """
    screen = Console()
    try:
        cells = plan(
            Cell(model, str(calibration), str(text), DENSE, "", samples, seq_len, window, windows),
            methods.split(","),
            patterns.split(","),
            vary,
            values,
        )
    except InputError as error:
        screen.print(f"compare_recipes: {error}", highlight=False)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    finished = read_cells(out / "cells.jsonl")
    failed = []
    for number, cell in enumerate(cells, 1):
        if any(done["cell"] == asdict(cell) for done in finished):
            continue
        screen.print(f"{number} of {len(cells)}: {_name(cell)}", highlight=False)
        ran = subprocess.run(
            [sys.executable, "-P", __file__, "cell", json.dumps(asdict(cell))], capture_output=True, text=True
        )
        if ran.returncode:
            failed.append(f"{_name(cell)}: {(ran.stderr.strip().splitlines() or ['no word'])[-1]}")
            continue
        finished.append(json.loads(ran.stdout.splitlines()[-1]))
        with (out / "cells.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(finished[-1]) + "\n")
    rows = table(cells, finished)
    write(rows, out)
    screen.print(render(rows))
    for sentence in failed:
        screen.print(f"failed: {sentence}", highlight=False, markup=False)
    return 1 if failed else 0


@app.command(name="cell")
def cell_command(settings: str) -> int:
    """Measure one cell and print it as a line of JSON; for the table's own use.

    Args:
        settings: the cell as JSON.
    """
    cell = Cell(**json.loads(settings))
    try:
        print(json.dumps({"cell": asdict(cell), **measure(cell)}))
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def plan(
    base: Cell, methods: Sequence[str], patterns: Sequence[str], vary: str | None, values: str | None
) -> list[Cell]:
    """The dense model, then every pattern with every method, and with every value of what is varied.

    Raises:
        InputError: something asked for is not known.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise InputError(f"--methods {unknown[0]} is not known; want some of {', '.join(METHODS)}")
    for pattern in patterns:
        split_pattern(pattern)
    if vary is None:
        if values is not None:
            raise InputError("--values has no effect without --vary")
        return [base, *(replace(base, method=m, pattern=p) for p in patterns for m in methods)]
    if vary not in VARIED:
        raise InputError(f"--vary {vary} is not known; want one of {', '.join(VARIED)}")
    field, kind, usual = VARIED[vary]
    try:
        chosen = usual if values is None else [kind(value) for value in values.split(",")]
    except ValueError as error:
        raise InputError(f"--values {values}: want numbers with commas between them") from error
    cells = [base]
    for pattern in patterns:
        for method in methods:
            for value in chosen:
                cell = replace(base, method=method, pattern=pattern, varied=vary, value=value)
                cells.append(cell if field else replace(cell, **{vary: value}))
    return cells


def split_pattern(text: str) -> tuple[Any, Storage]:
    """A pattern and how its weights are stored: ``2:4``, ``0.5``, ``2:4+int4``.

    Raises:
        InputError: it is none.
    """
    zeros, _, storage = text.partition("+")
    if storage not in ("", "int4", "int8"):
        raise InputError(f"--patterns {text}: {storage} is no storage; want int4 or int8 behind the +")
    try:
        pattern = parse_pattern(zeros, None) if ":" in zeros else parse_pattern(None, float(zeros))
    except ValueError as error:
        raise InputError(f"--patterns {text}: want N:M or a fraction of zeros") from error
    return pattern, FP32 if not storage else Storage(storage, 128 if storage == "int4" else 0)  # type: ignore[arg-type]


def measure(cell: Cell) -> dict[str, Any]:
    """Prune as the cell says, and evaluate.

    Raises:
        InputError: the model is no causal language model with a tokenizer, or what the pipeline raises.
    """
    stages = Stages()
    with stages.run("load"):
        pretrained = load(cell.model)
        if pretrained.kind != "causal" or pretrained.tokenizer is None:
            raise InputError(f"{cell.model} is not a causal language model with a tokenizer")
        calibration = read_windows(
            Path(cell.calibration), pretrained.tokenizer, samples=cell.samples, length=cell.seq_len
        )
        evaluation = read_windows(Path(cell.text), pretrained.tokenizer, samples=cell.windows, length=cell.window)
        traced = trace(pretrained)
        canonicalise(traced.program)
        parts = partition(traced.program)
    params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
    blocks: list[BlockReport] = []
    rounded: dict[str, Any] = {}
    if cell.method != DENSE:
        pattern, storage = split_pattern(cell.pattern)
        field = VARIED[cell.varied][0] if cell.varied else ""
        recipe = Recipe(pattern, **METHODS[cell.method], **({field: cell.value} if field else {}))
        batches = token_batches(traced, calibration, names=pretrained.inputs)
        with stages.run("prune"):
            blocks = prune(parts, params, recipe, batches, cache=cache_pairs(traced, parts))
        if storage != FP32:
            store(traced, params)
            packed = stored_weights(traced.program, lower_linears(traced.program, storage=storage))
            params, rounded = as_stored(params, packed), dict.fromkeys(packed, storage.activations)
    logits = graph_logits(pretrained, traced, parts, params, rounded)
    found = perplexity(logits, evaluation)
    answers = exact_answers(logits, pretrained.tokenizer)
    linears = [linear for block in blocks for linear in block.linears]
    size = sum(math.prod(linear.shape) for linear in linears)
    kept = sum(math.prod(x.shape) * (1 - x.sparsity) for x in linears if x.pattern)
    updated = cell.method != DENSE and METHODS[cell.method].get("update", "none") != "none"
    last = stages.done[-1]
    return {
        "perplexity": found.perplexity,
        "mean_nll": found.mean_nll,
        "windows": found.windows,
        "exact": dict(answers.scores),
        "error": sum(block.error for block in blocks) / len(blocks) if blocks else 0.0,
        "zeros": sum(x.sparsity * math.prod(x.shape) for x in linears) / size if size else 0.0,
        "learned": round(kept) if updated else 0,
        "seconds": last.seconds if blocks else 0.0,
        "peak_bytes": last.peak_bytes,
    }


def graph_logits(
    pretrained: Pretrained,
    traced: Traced,
    parts: Partition,
    params: Mapping[str, torch.Tensor],
    rounded: Mapping[str, Any],
) -> Logits:
    """The traced graph with other weights as a function from ids to logits; ``rounded`` as in ``expect``."""
    alive = live_after(parts)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        (batch,) = token_batches(traced, ids, names=pretrained.inputs, tokens_per_batch=ids.numel())
        values = start(parts, batch.inputs)
        for part, needed in zip(parts.parts, alive, strict=True):
            values.update(run_part_rounded(part, values, params, parts.params, rounded))
            for name in [n for n in values if n not in needed and n != parts.outputs[0]]:
                del values[name]
        found: torch.Tensor = values[parts.outputs[0]]
        return found

    return logits


def read_cells(file: Path) -> list[dict[str, Any]]:
    """The finished cells; a line that was cut short by an interruption is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def table(cells: Sequence[Cell], finished: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of the plan; those that are not finished are left out."""
    by_cell = {json.dumps(done["cell"], sort_keys=True): done for done in finished}
    rows: list[dict[str, Any]] = []
    for cell in cells:
        done = by_cell.get(json.dumps(asdict(cell), sort_keys=True))
        if done is None:
            continue
        figures = {name: value for name, value in done.items() if name not in ("cell", "exact")}
        dense = rows[0]["mean_nll"] if rows and rows[0]["method"] == DENSE else None
        varied = f"{cell.varied} {cell.value:g}" if cell.value is not None else ""
        row = {"method": cell.method, "pattern": cell.pattern, "varied": varied, **figures, **done["exact"]}
        row["dln"] = None if dense is None else row["mean_nll"] - dense
        rows.append(row)
    return rows


def write(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """The table as JSON, CSV and a plot of dln for every pattern and method."""
    (out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, list(COLUMNS), extrasaction="ignore")
        lines.writeheader()
        lines.writerows(rows)
    pruned = [row for row in rows if row.get("dln") is not None and row["method"] != DENSE]
    if pruned:
        plot(pruned, out / "table.png")


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Bars of dln: one group for each pattern (and value), one colour for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(f"{row['pattern']} {row['varied']}".strip() for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.6 * len(groups)), 4), layout="constrained")
    for place, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method]
        at = [groups.index(f"{row['pattern']} {row['varied']}".strip()) + place / (len(methods) + 1) for row in own]
        axes.bar(at, [row["dln"] for row in own], width=1 / (len(methods) + 1), label=method, align="edge")
    axes.set_xticks([i + len(methods) / (2 * len(methods) + 2) for i in range(len(groups))], groups)
    axes.set_ylabel("ln(sparse perplexity / dense perplexity)")
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def render(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table for the terminal."""
    shown = [name for name in COLUMNS if name != "varied" or any(row["varied"] for row in rows)]
    looks = {"perplexity": "{:.2f}", "dln": "{:.3f}", "error": "{:.3f}", "learned": "{:,}", "seconds": "{:.0f}"}
    looks |= dict.fromkeys(("copying", "brackets", "arithmetic", "zeros"), "{:.0%}")
    drawn = Table(*(COLUMNS[name] for name in shown))
    for row in rows:
        texts = {name: looks.get(name, "{}").format(row[name]) for name in shown if row.get(name) is not None}
        texts["peak_bytes"] = f"{row['peak_bytes'] / 1e9:.2f} GB"
        drawn.add_row(*(texts.get(name, "") for name in shown))
    return drawn


def _name(cell: Cell) -> str:
    varied = f", {cell.varied} {cell.value:g}" if cell.value is not None else ""
    return f"{cell.method} {cell.pattern}{varied}".strip()


if __name__ == "__main__":
    sys.exit(app(result_action="return_value"))
