"""One table of ways to prune: perplexity, exact answers, block error, what was learned, time and memory.

    python -P tools/compare_recipes.py MODEL --calibration FILE --text FILE --out FOLDER
        [--methods wanda,ria,...] [--patterns 2:4,0.5,2:4+int4,...] [--samples 32] [--seq-len 1024]
    python -P tools/compare_recipes.py MODEL ... --vary ria-power --values 0,0.5,1 --methods ria --patterns 2:4
    python -P tools/compare_recipes.py MODEL ... --vary rate-step --methods wanda+besa-row --patterns 0.5

Every cell is a process of its own, so its peak memory is its own. It prunes the traced model as the compiler does,
exports nothing, and evaluates the pruned graph in torch. A finished cell is a line of FOLDER/cells.jsonl and is not run
again; FOLDER/table.json, table.csv and table.png are written from all lines. A cell that fails is reported at the end
and tried again by the next run.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from cyclopts import App
from rich.console import Console
from sparsify_export.passes.errors import InputError

sys.path.append(str(Path(__file__).parent))  # behind the installed package, whose name a folder beside this file has
from recipe_table.cells import DENSE, METHODS, PATTERNS, Cell, plan
from recipe_table.measure import measure
from recipe_table.table import read_cells, render, table, write

app = App()
WIDTH = 160
"""Columns of the table where it is not printed on a screen: a log cut to 80 cannot be read."""


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
    skip: str = "",
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
        patterns: the same; N:M or a fraction of zeros, with +int8, +int4 or +int4g32 behind it for quantised weights.
        samples: calibration windows.
        seq_len: tokens in one.
        window: tokens in an evaluation window.
        windows: evaluation windows at most.
        skip: globs of module paths that stay dense, with commas between them: for ablations on some blocks.
        vary: samples, ria-power, or of BESA epochs, granularity, rate-step; every method is run with every value.
        values: of what is varied, with commas between them.
    """
    screen = Console(width=None if sys.stdout.isatty() else WIDTH)
    if importlib.util.find_spec("matplotlib") is None:  # before hours of work, not after
        screen.print("compare_recipes: matplotlib is not installed, which draws table.png: pip install matplotlib")
        return 2
    try:
        cells = plan(
            Cell(model, str(calibration), str(text), DENSE, "", samples, seq_len, window, windows, skip),
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
        if any(Cell(**done["cell"]) == cell for done in finished):
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
            lines.write("\n" + json.dumps(finished[-1]))  # in front: the line before may have been cut short
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


def _name(cell: Cell) -> str:
    varied = f", {cell.varied} {cell.value}" if cell.value is not None else ""
    return f"{cell.method} {cell.pattern}{varied}".strip()


if __name__ == "__main__":
    sys.exit(app(result_action="return_value"))
