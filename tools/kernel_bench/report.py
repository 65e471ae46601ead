"""Results as a table for people, as markdown, as JSON and as a plot."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from kernel_bench.measure import Result
from kernel_bench.rows import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

LEFT = ("N x K", "kernel", "against", "verdict")


def result_table(results: list[Result]) -> list[list[str]]:
    """A head and one line for each row."""
    names = list(dict.fromkeys(name for result in results for name in result.against))
    head = ["N x K", "kernel", "M", "us", "best us", "of floor", "GB/s", "GFLOP/s"]
    for name in names:
        head += [f"{name} us", "speed-up"]
    lines = [head]
    for result in results:
        line = [
            result.row.shape,
            result.row.kernel,
            str(result.row.tokens),
            f"{result.us:.1f}",
            f"{result.best_us:.1f}",
            f"{result.fraction_of_floor:.2f}",
            f"{result.bandwidth_gb_s:.0f}",
            f"{result.peak_gflop_s:.0f}",
        ]
        for name in names:
            there = result.against.get(name)
            line += [f"{there.us:.1f}", f"{there.speedup:.2f}x"] if there else ["-", "-"]
        lines.append(line)
    return lines


def requirement_records(requirements: list[Requirement], results: list[Result]) -> list[dict]:
    """What was required, what was measured (None where the opponent was not there), and whether it passes."""
    by_row = {result.row: result for result in results}
    records = []
    for row, against, required, stretch in requirements:
        result = by_row[row]
        if against == "floor":
            measured = result.fraction_of_floor
        else:
            measured = result.against[against].speedup if against in result.against else None
        records.append(
            {
                "M": row.tokens,
                "shape": row.shape,
                "kernel": row.kernel,
                "against": against,
                "required": required,
                "stretch": stretch,
                "measured": measured,
                "pass": None if measured is None else measured >= required,
            }
        )
    return records


def requirement_table(records: list[dict]) -> list[list[str]]:
    """A head and one line for each requirement."""
    lines = [["M", "N x K", "kernel", "against", "required", "stretch", "measured", "verdict"]]
    for record in records:
        measured = record["measured"]
        if measured is None:
            verdict = "not measured"
        elif not record["pass"]:
            verdict = "FAIL"
        else:
            verdict = "stretch" if measured >= record["stretch"] else "pass"
        shown = "-" if measured is None else f"{measured:.2f}"
        first = [str(record["M"]), record["shape"], record["kernel"], record["against"]]
        lines.append([*first, f"{record['required']:.2f}", f"{record['stretch']:.2f}", shown, verdict])
    return lines


def print_table(lines: list[list[str]], title: str) -> None:
    """Draw a table on the terminal."""
    table = Table(title=escape(title))
    for column in lines[0]:
        table.add_column(column, justify="left" if column in LEFT else "right")
    for line in lines[1:]:
        table.add_row(*line)
    Console(width=max(140, 12 * len(lines[0]) + 20)).print(table)


def markdown(lines: list[list[str]], title: str) -> str:
    """The same table for a README."""
    rule = ["---" if column in LEFT else "---:" for column in lines[0]]
    body = "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
    return f"{title}\n\n{body}\n"


def record(result: Result) -> dict:
    """A result as JSON holds it, the row's fields beside its times."""
    fields = asdict(result)
    row = fields.pop("row")
    return {**row, "nm": f"{row['nm'][0]}:{row['nm'][1]}", "kernel": result.row.kernel, **fields}


def saved_table(document: dict) -> list[list[str]]:
    """What ``--json`` once printed, as a head and one line for each row."""
    names = list(dict.fromkeys(name for row in document["results"] for name in row["against"]))
    lines = [["N x K", "kernel", "M", "us", "best us", "of floor", *(f"against {name}" for name in names)]]
    for row in document["results"]:
        there = [row["against"].get(name) for name in names]
        lines.append(
            [
                f"{row['rows']}x{row['cols']}",
                row["kernel"],
                str(row["tokens"]),
                f"{row['us']:,.0f}",
                f"{row['best_us']:,.0f}",
                f"{row['fraction_of_floor']:.2f}",
                *(f"{each['speedup']:.2f}x" if each else "-" for each in there),
            ]
        )
    return lines


def saved_title(document: dict) -> str:
    """Which machine it was, in one line."""
    features = " ".join(document["features"])
    return (
        f"{document['processor']} ({features}; {document['cache_mb']:.0f} MB of cache), kernels {document['isa']}, "
        f"{document['threads']} threads, ONNX Runtime {document['onnxruntime']}"
    )


def plot(path: Path, over_tokens: list[Result], over_sparsity: list[Result], title: str) -> None:
    """Draw speed-up over tokens (left) and over sparsity (right) as a PNG; matplotlib is needed only here."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    _lines(left, over_tokens, lambda row: row.kernel, lambda row: row.tokens)
    left.set_xscale("log", base=2)
    tokens = sorted({result.row.tokens for result in over_tokens})
    left.set_xticks(tokens, labels=[str(count) for count in tokens])
    left.set_xlabel("tokens (M)")
    left.set_ylabel("speed-up of our kernel")
    _lines(right, over_sparsity, lambda row: f"bitmask f32, M = {row.tokens}", lambda row: row.sparsity)
    right.set_xlabel("sparsity")
    figure.suptitle(title)
    beside = path.with_name(path.name + ".part")
    figure.savefig(beside, format="png", dpi=150)
    beside.rename(path)
    pyplot.close(figure)


def _lines(axes, results: list[Result], label: Callable, place: Callable) -> None:
    style = {"dense": "o-", "deepsparse": "s--", "int8": "^:", "int4-32": "v:", "int4-128": "v-."}
    groups = dict.fromkeys((label(result.row), name) for result in results for name in result.against)
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(name for name, _ in groups))}
    for group, name in groups:
        points = [(place(r.row), r.against[name].speedup) for r in results if label(r.row) == group]
        opponent = "DeepSparse" if name == "deepsparse" else f"ONNX Runtime {name}"
        axes.plot(*zip(*points, strict=True), style[name], color=colours[group], label=f"{group} against {opponent}")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
