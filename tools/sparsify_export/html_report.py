"""``report.html``: what one or two compilations gained and lost, in one file that loads nothing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError

from .passes.errors import InputError
from .passes.files import read_json

NO_GAIN = 1.05
"""A speed-up below this is within what repeated runs differ by, and is called none."""


@dataclass(frozen=True)
class Bar:
    """A line of a chart: its name, its figure as text, and its length as a share of the longest."""

    name: str
    figure: str
    share: float


@dataclass(frozen=True)
class Chart:
    """Bars that are compared with each other."""

    title: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class View:
    """What the page shows of one report.

    Attributes:
        name: the model.
        file: where the report lies.
        verdict: whether it was worth it, in one line.
        facts: what and its figure.
        charts: error, retained score, sparsity and bytes by layer, and milliseconds.
        linears: a row a linear, as the report has it, with ``ratio``, the share of its bytes.
    """

    name: str
    file: str
    verdict: str
    facts: tuple[tuple[str, str], ...]
    charts: tuple[Chart, ...]
    linears: tuple[Mapping[str, Any], ...]


def read_view(path: Path) -> View:
    """The report of a folder or a file that we wrote: ``report.json`` in it, or ``FILE.report.json`` beside it.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    beside = path.with_name(f"{path.name}.report.json")
    file = path / "report.json" if path.is_dir() else path if path.suffix == ".json" else beside
    if not file.is_file():
        raise InputError(f"{path} has no report: {file} does not exist")
    report = read_json(file)
    try:
        if report["written_by"] != "sparsify-export":
            raise InputError(f"{file} was not written by sparsify-export")
        return _view(report, file)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{file} is not a report of this version of sparsify-export: {error!r}") from error


def render_html(views: Sequence[View]) -> str:
    """The page; everything that comes from a report is escaped.

    Raises:
        InputError: a report lacks what the page shows, or has something else there.
    """
    loader = PackageLoader("sparsify_export", "", encoding="utf-8")
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    try:
        return page.get_template("report.html.jinja").render(views=views)
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(f"a report is not one of this version of sparsify-export: {error}") from error


def _view(report: Mapping[str, Any], file: Path) -> View:
    linears = [{**e, "ratio": e["stored_bytes"] / e["dense_bytes"]} for e in report["linears"]]
    return View(
        name=str(report["source"]),
        file=str(file),
        verdict=_verdict(report),
        facts=tuple(_facts(report)),
        charts=tuple(chart for chart in (*_layers(report), _latency(report)) if chart.bars),
        linears=tuple(linears),
    )


def _verdict(report: Mapping[str, Any]) -> str:
    """Bytes, speed and loss in one line; what was not measured is not in it."""
    dense, stored = report["dense_linear_bytes"], report["stored_linear_bytes"]
    smaller = stored < dense
    ratios = [row["ratio"] for row in report["latency"] if row["ratio"] is not None]
    faster = bool(ratios) and min(ratios) >= NO_GAIN
    slower = bool(ratios) and max(ratios) < NO_GAIN
    gains = [word for word, gained in (("smaller", smaller), ("faster", faster)) if gained]
    if ratios and not faster and not slower:
        gains.append("faster in part")
    parts = [" and ".join(gains).capitalize() if gains else "No gain"]
    if dense:
        parts.append(f"linears take {stored / dense:.3f} of their dense fp32 bytes")
    if ratios:
        parts.append(f"{min(ratios):.2f}x to {max(ratios):.2f}x as fast as {_against(report)}")
    if report["evaluation"]:
        result, before = (report["evaluation"][name]["perplexity"] for name in ("result", "dense"))
        parts.append(f"perplexity {result:.2f}, dense {before:.2f}")
    return "; ".join(parts) + "."


def _against(report: Mapping[str, Any]) -> str:
    if report["engine"] is not None:
        return "without sparse tactics"
    return "the same file without our kernels" if report["given_bytes"] is None else "the model given"


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    lowered = sum(not e["reason"] for e in report["linears"])
    facts = [
        ("linears lowered to sparse ops", f"{lowered} of {len(report['linears'])}"),
        ("their dense fp32 bytes", _mb(report["dense_linear_bytes"])),
        ("as stored", _mb(report["stored_linear_bytes"])),
        ("file", _mb(report["file_bytes"])),
    ]
    for row in report["latency"]:
        against = f", {_against(report)} {row['against']['p50']:.1f} ms" if row["against"] else ""
        facts.append((row["name"], f"{row['model']['p50']:.1f} ms{against}, {row['runs']} runs each"))
    if report["evaluation"]:
        facts += [
            (f"exact answers, {name}", json.dumps(report["evaluation"][f"{name}_answers"]))
            for name in ("dense", "result")
        ]
    if report.get("alternatives"):  # reports of older versions have none
        facts += [(f"alternative: {row['name']}", _alternative(row)) for row in report["alternatives"]["rows"]]
        facts.append(("verdict", report["alternatives"]["verdict"]))
    facts += [
        (f"verified with {v['how']}", f"max error {v['error']:.2e}, allowed {v['allowed']:.2e}")
        for v in report["verified"]
    ]
    facts += [(s["name"], f"{s['seconds']:.1f} s, {_mb(s['peak_bytes'])}") for s in report["stages"]]
    facts += [
        (name.replace("_", " "), str(value)) for name, value in report["settings"].items() if value not in (None, [])
    ]
    return facts


def _alternative(row: Mapping[str, Any]) -> str:
    """Time, size and loss of what else the model could be."""
    if row["failed"]:
        return f"not made: {row['failed']}"
    loss = "" if row["perplexity"] is None else f", perplexity {row['perplexity']:.2f}"
    return f"{row['ms']:.2f} ms, {row['speedup']:.2f}x, {_mb(row['nbytes'])}{loss}"


def _layers(report: Mapping[str, Any]) -> list[Chart]:
    """By layer: its error, the score that its mask keeps, its zeros and its bytes, each over its pruned linears."""
    found: dict[str, list[tuple[str, float]]] = {"error": [], "kept": [], "zeros": [], "bytes": []}
    for block in report["blocks"]:
        path = block["path"]
        own = [e for e in report["linears"] if e["path"].startswith(f"{path}.") and e["sparsity"] is not None]
        if not own:
            continue
        found["error"].append((path, block["error"]))
        found["kept"].append((path, _mean(own, "retained_after")))
        found["zeros"].append((path, _mean(own, "sparsity")))
        found["bytes"].append((path, sum(e["stored_bytes"] for e in own)))
    return [
        _chart("Relative error of each layer's output, squared", found["error"], "{:.3f}"),
        _chart("Score that the masks of each layer keep", found["kept"], "{:.3f}"),
        _chart("Zeros in each layer's pruned weights", found["zeros"], "{:.3f}"),
        _chart("Bytes of each layer's pruned weights", [(n, b / 1e6) for n, b in found["bytes"]], "{:.2f} MB"),
    ]


def _mean(linears: Sequence[Mapping[str, Any]], name: str) -> float:
    weights = [e["shape"][0] * e["shape"][1] for e in linears]
    total: float = sum((e[name] or 0.0) * w for e, w in zip(linears, weights, strict=True))
    return total / float(sum(weights))


def _latency(report: Mapping[str, Any]) -> Chart:
    rows = []
    for row in report["latency"]:
        rows.append((row["name"], row["model"]["p50"]))
        if row["against"]:
            rows.append((f"{row['name']}, {_against(report)}", row["against"]["p50"]))
    return _chart("Median latency", rows, "{:.1f} ms")


def _chart(title: str, values: Sequence[tuple[str, float]], form: str) -> Chart:
    most = max((value for _, value in values), default=0.0)
    return Chart(title, tuple(Bar(n, form.format(v), v / most if most > 0 else 0.0) for n, v in values))


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
