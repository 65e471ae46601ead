"""How fast the sparse ops are inside ONNX Runtime: against other runtimes, and against this machine's limits.

    python -P tools/bench_kernels.py                            # fp32, 4096x4096, 1, 16 and 256 tokens
    python -P tools/bench_kernels.py --type all --shape all --tokens 1 --json
    python -P tools/bench_kernels.py --rows required            # the kernel rows of the issue's table, pass or fail
    python -P tools/bench_kernels.py --plot speedup.png         # over tokens and over sparsity; needs matplotlib
    python -P tools/bench_kernels.py --pack --type all          # how long packing 1 GB of fp32 weights takes
    python -P tools/bench_kernels.py --read A.json B.json       # a table of what --json printed, by machine

Opponents: dense (ONNX Runtime, float32 MatMul), int8 (its DynamicQuantizeLinear and MatMulIntegerToFloat, a scale for
each column), int4-32 and int4-128 (its MatMulNBits, accuracy level 4, with blocks of 32 and 128), and with
--deepsparse PYTHON also DeepSparse 1.8.0 on the same pruned weight, in a process of its own. To install that:

    python3.11 -m venv /tmp/ds-venv && /tmp/ds-venv/bin/pip install deepsparse==1.8.0
    python -P tools/bench_kernels.py --deepsparse /tmp/ds-venv/bin/python

Ours runs before every run of an opponent, so that both see the same disturbances; a speed-up is the median of the
ratios of such neighbours. Our result is compared with numpy's before it is timed. Up to 16 tokens every contestant runs
as many layers as make 200 MB of its own weights, or more than the last level of cache where that is larger, so that
they come from memory as they do in a model; times are those
of one layer. With --threads 1 processor time is taken, which other processes on the machine do not stretch (they still
share memory and caches).

The floor is the larger of (bytes of the packed weight / read bandwidth) and (2 M N K / peak), both measured just before
each row; kernel_bench/measure.py says what the peak of each type is.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import onnxruntime
from rich.console import Console
from sparsify_export import _native

sys.path.append(str(Path(__file__).parent))  # behind the installed package, whose source folder is there as well

from kernel_bench import report
from kernel_bench.machine import about, last_level_cache
from kernel_bench.measure import Bench, Result
from kernel_bench.packing import measure_packing, packing_table
from kernel_bench.rows import OPPONENTS, TYPES, Row, over_sparsity, over_tokens, required

SHAPES = ["4096x4096", "11008x4096", "576x576", "192x576", "1536x576", "576x1536"]


# What each mode has no use for: refused rather than ignored.
USELESS = {
    "rows": ("format", "type", "tokens", "nm", "sparsity", "group", "gigabytes"),
    "plot": ("format", "type", "tokens", "nm", "sparsity", "group", "gigabytes"),
    "pack": ("tokens", "against", "deepsparse", "seconds", "megabytes"),
    "read": (
        *("format", "type", "tokens", "shape", "nm", "sparsity", "group"),
        *("against", "deepsparse", "seconds", "megabytes", "gigabytes"),
    ),
    "": ("gigabytes",),
}
DEFAULTS = {
    "format": ["nm", "bitmask"],
    "type": ["f32"],
    "tokens": [1, 16, 256],
    "nm": "2:4",
    "sparsity": [0.5],
    "group": [32],
    "seconds": 2.0,
    "megabytes": max(200.0, 1.25 * last_level_cache() / 1e6),
    "gigabytes": 1.0,
}


def parser() -> argparse.ArgumentParser:
    """The options; those left out are None."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    what = made.add_mutually_exclusive_group()
    what.add_argument("--rows", choices=["required"], help="the rows of the issue's table, and whether they pass")
    what.add_argument("--plot", type=Path, metavar="FILE.png", help="fp32 over M and over sparsity, as a picture too")
    what.add_argument("--read", type=Path, nargs="+", metavar="FILE.json", help="print tables of what --json printed")
    what.add_argument("--pack", action="store_true", help="time the packing of fp32 weights instead")
    add("--format", nargs="+", choices=["nm", "bitmask"], help="default both")
    add("--type", nargs="+", choices=[*TYPES, "all"], help="default f32")
    add("--tokens", nargs="+", type=int, metavar="M", help="default 1 16 256")
    add("--shape", nargs="+", metavar="NxK", help=f"or all: {' '.join(SHAPES)}")
    add("--nm", help="pattern of nm (default 2:4)")
    add("--sparsity", nargs="+", type=float, help="of bitmask (default 0.5)")
    add("--group", nargs="+", type=int, choices=[32, 64, 128], help="of i4 (default 32)")
    add("--against", nargs="*", choices=OPPONENTS, help="default all that are there; of --plot dense and deepsparse")
    add("--deepsparse", metavar="PYTHON", help="an interpreter that has DeepSparse 1.8.0")
    add("--threads", type=int, default=2, help="of every contestant (default 2)")
    add("--seconds", type=float, help="for each row (default 2)")
    add("--megabytes", type=float, help="of weights to cycle through (less than the cache holds stays there)")
    add("--gigabytes", type=float, help="of --pack (default 1)")
    output = made.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--markdown", action="store_true", help="print a table for a README")
    return made


def parse(line: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked, with the defaults filled in."""
    made = parser()
    args = made.parse_args(line)
    mode = "rows" if args.rows else "plot" if args.plot else "pack" if args.pack else "read" if args.read else ""
    for name in USELESS[mode]:
        if getattr(args, name) is not None:
            made.error(f"--{name} has no effect with --{mode}" if mode else f"--{name} needs --pack")
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    if args.read and (args.json or args.markdown):
        made.error("--read prints markdown, and nothing else")
    if "all" in args.type:
        args.type = list(TYPES)
    chosen = SHAPES if args.shape == ["all"] else args.shape or (SHAPES[:2] if args.rows else SHAPES[:1])
    try:
        args.shape = [(int(rows), int(cols)) for rows, cols in (shape.split("x") for shape in chosen)]
        n, m = map(int, args.nm.split(":"))
    except ValueError:
        made.error(f"--shape must be NxK and --nm N:M, got {' '.join(chosen)} and {args.nm}")
    args.nm = n, m
    if not 0 < n <= m or ("nm" in args.format and any(cols % m for _, cols in args.shape)):
        made.error(f"--nm must be N:M with N from 1 to M, and every K a multiple of M; got {n}:{m}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        made.error("--plot needs matplotlib: pip install matplotlib")
    if args.plot and len(args.shape) > 1:
        made.error(f"--plot takes one shape, got {len(args.shape)}")
    if args.against is None:
        args.against = ["dense"] if args.plot else [name for name in OPPONENTS if name != "deepsparse"]
        args.against += ["deepsparse"] if args.deepsparse else []
    if ("deepsparse" in args.against) != bool(args.deepsparse):
        made.error("--against deepsparse and --deepsparse PYTHON need each other")
    return args


def chosen_rows(args: argparse.Namespace) -> list[Row]:
    """The rows that the options name, those of one weight side by side."""
    rows = []
    for shape in args.shape:
        for tokens in args.tokens:
            for format in args.format:
                for sparsity in args.sparsity if format == "bitmask" else args.sparsity[:1]:
                    for type in args.type:
                        for group in args.group if type == "i4" else args.group[:1]:
                            rows.append(Row(format, type, *shape, tokens, args.nm, sparsity, group))
    return rows


def main() -> None:
    """Measure and print."""
    args = parse()
    if args.read:
        for path in args.read:
            document = json.loads(path.read_text(encoding="utf-8"))
            if not {"processor", "results"} <= document.keys():
                sys.exit(f"{path} is not what --json prints of a measurement")
            sys.stdout.write(report.markdown(report.saved_table(document), report.saved_title(document)) + "\n")
        return
    if args.pack:
        args.tokens = [1]
        packed = [measure_packing(row, args.gigabytes, args.threads) for row in chosen_rows(args)]
        show(args, [("Packing", packing_table(packed))], {"packing": packed})
        return

    requirements = list(required(args.shape)) if args.rows else []
    if args.rows:
        wanted: dict[Row, set[str]] = {}
        for requirement in requirements:
            wanted.setdefault(requirement.row, set()).add(requirement.against)
        order = sorted(wanted, key=lambda row: (row.rows, row.cols, row.tokens, row.format, row.sparsity))
        work = [(row, [name for name in args.against if name in wanted[row]]) for row in order]
    elif args.plot:
        shape = args.shape[0]
        work = [(row, args.against) for row in dict.fromkeys([*over_tokens(*shape), *over_sparsity(*shape)])]
    else:
        work = [(row, args.against) for row in chosen_rows(args)]

    bench = Bench(threads=args.threads, seconds=args.seconds, megabytes=args.megabytes, deepsparse=args.deepsparse)
    results: dict[Row, Result] = {}
    try:
        with Console(stderr=True).status("") as status:
            for number, (row, against) in enumerate(work, 1):
                status.update(f"{number} of {len(work)}: {row.shape} {row.kernel} M = {row.tokens}")
                results[row] = bench.row(row, against)
    finally:
        bench.close()

    title = f"{_native.isa()}, {args.threads} threads, ONNX Runtime {onnxruntime.__version__}"
    if args.plot:
        shape = args.shape[0]
        halves = ([results[row] for row in rows] for rows in (over_tokens(*shape), over_sparsity(*shape)))
        report.plot(args.plot, *halves, f"{shape[0]}x{shape[1]}, {title}")
    records = report.requirement_records(requirements, list(results.values()))
    tables = [(title, report.result_table(list(results.values())))]
    if requirements:
        tables.append(("Required", report.requirement_table(records)))
    show(args, tables, {"results": [report.record(result) for result in results.values()], "required": records})


def show(args: argparse.Namespace, tables: list[tuple[str, list[list[str]]]], document: dict) -> None:
    """Print as the options say."""
    if args.json:
        json.dump({**about(args.threads), **document}, sys.stdout, indent=1)
        return
    for title, lines in tables:
        if args.markdown:
            sys.stdout.write(report.markdown(lines, title) + "\n")
        else:
            report.print_table(lines, title)


if __name__ == "__main__":
    main()
