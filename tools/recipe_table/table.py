"""The table: from finished cells to rows, and rows as JSON, CSV, a plot and a table for the terminal."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .cells import DENSE, Cell

COLUMNS = {
    "method": "method", "pattern": "pattern", "varied": "varied", "perplexity": "perplexity", "dln": "dln",
    "copying": "copying", "brackets": "brackets", "arithmetic": "arithmetic", "error": "block error",
    "zeros": "zeros", "learned": "learned", "seconds": "seconds", "peak_bytes": "peak memory",
}  # fmt: skip


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
    by_cell = {Cell(**done["cell"]): done for done in finished}
    rows: list[dict[str, Any]] = []
    dense: float | None = None
    for cell in cells:
        done = by_cell.get(cell)
        if done is None:
            continue
        figures = {name: value for name, value in done.items() if name not in ("cell", "exact")}
        if cell.method == DENSE:
            dense = done["mean_nll"]
        varied = f"{cell.varied} {cell.value}" if cell.value is not None else ""
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
