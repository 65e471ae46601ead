"""On a machine with an NVIDIA GPU: are the kernels right, and how fast are they? Writes a report to send back.

    make gpu-check, or: python -P tools/gpu_check.py --out gpu_report.md

First every kernel against float64. Then each against torch's dense FP16 product (and against cuSPARSELt's 2:4 product,
where torch has it), in turns, with weights that no cache holds. Exit codes: 0, 2 no GPU kernels in this installation,
3 no GPU, 4 a result is wrong (the report is written, latencies are not taken).
"""

import argparse
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from sparsify_export.calibrate import ranked
from sparsify_export.calibrate.gpu import kernels
from sparsify_export.calibrate.masks import fraction_keep_mask, nm_keep_mask
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_bitmask, linear_nm, linear_nm_int4
from sparsify_export.passes.equivalence import compare
from torch import Tensor

TWO_FOUR = NM(2, 4)
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
"""out_features N x in_features K of the latencies."""

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 512, 2048)
MOST_DECODED = 64
"""Tokens up to which decode is timed; few up to twice as many, so that every border of cuda/choose.cuh can be read."""

GROUP = 128
UNCACHED = 512 << 20
"""Bytes of weights that take turns: more than any GPU's cache."""

TYPES = (
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
)
"""Activations and weights."""


@dataclass(frozen=True)
class Check:
    """One kernel at one shape.

    Attributes:
        kernel: its name, with its types.
        shape: in words.
        error: largest absolute error against float64.
        allowed: the error that the plain expression in the same types would be allowed.
    """

    kernel: str
    shape: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is allowed."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Row:
    """Microseconds of every contestant for N, K and M; None where it cannot run."""

    n: int
    k: int
    m: int
    times: dict[str, float | None]


def weights(n: int, k: int) -> tuple[Tensor, Tensor]:
    """A 2:4 weight and one with half of its values gone anywhere, float32 ``[n, k]``."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    return (
        torch.where(nm_keep_mask(weight.abs(), TWO_FOUR), weight, 0.0),
        torch.where(fraction_keep_mask(weight.abs(), 0.5, "row"), weight, 0.0),
    )


def linears(cuda: ModuleType, device: str, m: int, n: int, k: int) -> Iterator[Check]:
    """Every version of the linears for ``m`` tokens; ``k`` a multiple of 4."""
    two_four, anywhere = weights(n, k)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1))
    for x_type, w_type in TYPES:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(2)).to(x_type)
        types = f"{x_type} x {w_type}".replace("torch.", "")
        tensor_cores = x_type == w_type != torch.float32
        for name, weight, packed, run, on_tensor_cores in (
            ("spmm_24", two_four, linear_nm.pack(two_four, TWO_FOUR, w_type), cuda.spmm_24, ["few", "prefill"]),
            ("spmm_bitmask", anywhere, linear_bitmask.pack(anywhere, w_type), cuda.spmm_bitmask, ["prefill"]),
        ):
            versions = ["readable", "decode", *(on_tensor_cores if tensor_cores else []), ""]
            dense = weight.to(w_type)
            exact = x.double() @ dense.double().T + bias
            plain = (x.float() @ dense.float().T + bias).to(x_type)
            there = [tensor.to(device) for tensor in (x, *packed, bias)]
            for version in versions:
                y = torch.empty(m, n, dtype=x_type, device=device)
                run(*there, y, 0, version)
                found = compare(y.cpu(), plain, exact)
                yield Check(f"{name} {version or 'chosen'}, {types}", f"{m} x {n} x {k}", found.error, found.budget)


def int4(cuda: ModuleType, device: str, m: int, n: int, k: int) -> Iterator[Check]:
    """2:4 in 4 bits, with tokens of 8: the exact result is that of the codes."""
    two_four, _ = weights(n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(2))
    packed = linear_nm_int4.pack(two_four, TWO_FOUR, GROUP)
    there = [tensor.to(device) for tensor in packed]
    codes = torch.empty(m, -(-k // 16) * 16, dtype=torch.int8, device=device)
    steps = torch.empty(m, device=device)
    cuda.quantise_tokens(x.to(device), codes, steps, 0)
    step = x.abs().amax(dim=1) / 127
    rounded = (x / step[:, None]).round()
    off = (codes.cpu()[:, :k].float() - rounded).abs().max().item()
    yield Check("quantise_tokens, codes", f"{m} x {k}", off, 1.0)
    found = compare(steps.cpu(), step, step.double())
    yield Check("quantise_tokens, steps", f"{m} x {k}", found.error, found.budget)

    dense = linear_nm_int4.unpack(*packed, TWO_FOUR, GROUP, k)
    tokens = codes.cpu()[:, :k].double() * steps.cpu()[:, None].double()
    exact = tokens @ dense.double().T
    plain = tokens.float() @ dense.T
    for version in ("readable", ""):
        y = torch.empty(m, n, device=device)
        cuda.spmm_24_int4(codes, steps, *there, None, y, k, GROUP, 0, version)
        found = compare(y.cpu(), plain, exact, factor=4.0)
        yield Check(f"spmm_24_int4 {version or 'decode'}", f"{m} x {n} x {k}", found.error, found.budget)


def others(cuda: ModuleType, device: str, m: int, k: int) -> Iterator[Check]:
    """The gather, and BESA's mask with its gradients."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(3))
    index = torch.randperm(k, generator=torch.Generator().manual_seed(4))
    y = torch.empty(m, k, device=device)
    cuda.gather_channels(x.to(device), index.to(device), y, 0)
    yield Check("gather_channels", f"{m} x {k}", (y.cpu() - x[:, index]).abs().max().item(), 0.0)

    rank = ranked.ranks(torch.randn(m, k, generator=torch.Generator().manual_seed(5)))
    counts = torch.randint(0, k + 1, (m,), generator=torch.Generator().manual_seed(6)).int()
    grad = torch.randn(m, k, generator=torch.Generator().manual_seed(7))
    there = [tensor.to(device) for tensor in (x, rank, counts)]
    cuda.rate_mask_forward(*there, y, 0)
    kept = torch.where(ranked.keep_mask(rank, counts), x, 0.0)
    yield Check("rate_mask_forward", f"{m} x {k}", (y.cpu() - kept).abs().max().item(), 0.0)
    for rows in (m, 1):
        beta, room = torch.empty(rows, 101, device=device), torch.empty(m, 101, device=device)
        cuda.rate_mask_backward(*there, grad.to(device), y, beta, room if rows == 1 and m > 1 else None, 0)
        for_weight, plain = ranked.rate_mask_backward(grad, x, rank, counts, rows, 101, True)
        edges = torch.arange(101) * k // 100
        products = torch.zeros(m, k, dtype=torch.float64).scatter_(1, rank.long(), -(grad.double() * x.double()))
        below = torch.cat([torch.zeros(m, 1, dtype=torch.float64), products.cumsum(1)], dim=1)[:, edges]
        exact = below if rows == m else below.sum(0, keepdim=True)
        yield Check("rate_mask_backward, weight", f"{m} x {k}", (y.cpu() - for_weight).abs().max().item(), 0.0)
        found = compare(beta.cpu(), plain, exact, factor=4.0)
        yield Check(f"rate_mask_backward, beta of {rows} rows", f"{m} x {k}", found.error, found.budget)


def numerics(cuda: ModuleType, device: str, shapes: list[tuple[int, int, int]]) -> Iterator[Check]:
    """Every kernel at every shape ``(tokens, rows, columns)``."""
    for m, n, k in shapes:
        yield from linears(cuda, device, m, n, k)
        yield from int4(cuda, device, m, n, k)
        yield from others(cuda, device, m, k)


def timed(runs: dict[str, Callable[[int], object]], repeats: int = 20, launches: int = 20) -> dict[str, float]:
    """Median microseconds of a launch; contestants in turns, each given the number of its call."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 3):
        for name, run in runs.items():
            torch.cuda._sleep(2_000_000)  # launches queue up behind it, so that the CPU is not what is timed
            events[0].record()
            for i in range(launches):
                run(repeat * launches + i)
            events[1].record()
            events[1].synchronize()
            if repeat >= 3:
                times[name].append(1000 * events[0].elapsed_time(events[1]) / launches)
    return {name: statistics.median(found) for name, found in times.items()}


def latencies(n: int, k: int) -> tuple[list[Row], list[str]]:
    """Times for every number of tokens, and why a contestant is missing."""
    two_four, anywhere = weights(n, k)
    turns = max(2, -(-UNCACHED // (n * k)))  # the smallest of them has about n k / 4 bytes, the dense one 2 n k
    missing = []

    def copies(*tensors: Tensor) -> list[list[Tensor]]:
        return [[tensor.cuda() for tensor in tensors] for _ in range(turns)]

    dense = copies(two_four.half())
    packed_24 = copies(*linear_nm.pack(two_four, TWO_FOUR, torch.float16))
    packed_bits = copies(*linear_bitmask.pack(anywhere, torch.float16))
    packed_int4 = copies(*linear_nm_int4.pack(two_four, TWO_FOUR, GROUP))
    lt: list[Tensor] = []
    try:
        torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = False  # cuSPARSELt
        lt = [torch.sparse.to_sparse_semi_structured(weight[0]) for weight in dense]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        missing.append(f"cuSPARSELt for {n} x {k}: {str(error).splitlines()[0]}")

    rows = []
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda", dtype=torch.float16)
        y = torch.empty(m, n, device="cuda", dtype=torch.float16)
        codes = torch.empty(m, k, device="cuda", dtype=torch.int8)
        steps = torch.empty(m, device="cuda")
        with kernels(x) as (cuda, stream):

            def linear_24(i: int, version: str, x: Tensor = x, y: Tensor = y) -> None:
                cuda.spmm_24(x, *packed_24[i % turns], None, y, stream, version)

            def linear_bits(i: int, version: str, x: Tensor = x, y: Tensor = y) -> None:
                cuda.spmm_bitmask(x, *packed_bits[i % turns], None, y, stream, version)

            def linear_int4(i: int, x: Tensor = x, y: Tensor = y, codes: Tensor = codes, steps: Tensor = steps) -> None:
                cuda.quantise_tokens(x, codes, steps, stream)
                cuda.spmm_24_int4(codes, steps, *packed_int4[i % turns], None, y, k, GROUP, stream)

            runs: dict[str, Callable[[int], object]] = {
                "dense": lambda i, x=x: torch.nn.functional.linear(x, dense[i % turns][0]),
                "24 prefill": partial(linear_24, version="prefill"),
                "bitmask prefill": partial(linear_bits, version="prefill"),
                "24 int4": linear_int4,
            }
            if m <= 2 * MOST_DECODED:
                runs["24 few"] = partial(linear_24, version="few")
            if m <= MOST_DECODED:
                runs["24 decode"] = partial(linear_24, version="decode")
                runs["bitmask decode"] = partial(linear_bits, version="decode")
            if lt:
                runs["cuSPARSELt"] = lambda i, x=x: torch.nn.functional.linear(x, lt[i % turns])
                try:
                    runs["cuSPARSELt"](0)
                except (RuntimeError, NotImplementedError) as error:
                    missing.append(f"cuSPARSELt for {n} x {k}, {m} tokens: {str(error).splitlines()[0]}")
                    del runs["cuSPARSELt"]
            found = timed(runs)
        rows.append(Row(n, k, m, {name: found.get(name) for name in [*runs, "cuSPARSELt"]}))
    return rows, missing


def page(machine: list[str], checks: list[Check], rows: list[Row], missing: list[str]) -> str:
    """The report as Markdown."""
    wrong = [check for check in checks if not check.ok]
    lines = ["# GPU report", "", *(f"- {line}" for line in machine), "", "## Numerics", ""]
    lines.append(f"{len(checks) - len(wrong)} of {len(checks)} results are as close to float64 as they must be.")
    lines += ["", "| kernel | tokens x rows x columns | largest error | allowed | |", "|---|---|---|---|---|"]
    for c in sorted(checks, key=lambda check: check.ok):
        lines.append(f"| {c.kernel} | {c.shape} | {c.error:.2e} | {c.allowed:.2e} | {'' if c.ok else 'WRONG'} |")
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row.times))
        lines += ["", "## Microseconds of a linear, FP16", ""]
        lines += [
            "Medians, in turns; weights from memory, not from a cache. In brackets: dense over it.",
            "",
        ]
        lines += ["| N x K | M | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
        for row in rows:
            cells = [_cell(row.times.get(name), row.times["dense"]) for name in names]
            lines.append(f"| {row.n} x {row.k} | {row.m} | " + " | ".join(cells) + " |")
    lines += [f"\nNot measured: {reason}." for reason in missing]
    return "\n".join(lines) + "\n"


def _cell(time: float | None, dense: float | None) -> str:
    return "-" if time is None or dense is None else f"{time:.1f} ({dense / time:.2f})"


def machine() -> list[str]:
    """What the numbers belong to."""
    properties = torch.cuda.get_device_properties(0)
    return [
        f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}",
        f"{platform.platform()}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Check, time, report."""
    parser = argparse.ArgumentParser(description="Check and time the GPU kernels, and write a report to send back.")
    parser.add_argument("--find", action="store_true", help="only say whether there is a GPU")
    parser.add_argument("--out", type=Path, default=Path("gpu_report.md"), help="the report")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write(
            f"There is no NVIDIA GPU that torch {torch.__version__} can use on this machine, and the GPU kernels can "
            "only be checked on one.\n"
        )
        return 3
    if args.find:
        return 0
    try:
        with kernels(torch.empty(0, device="cuda")) as (cuda, _):
            checks = list(numerics(cuda, "cuda", [(1, 64, 64), (5, 100, 1028), (8, 1000, 4096), (200, 333, 2048)]))
    except ImportError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    rows: list[Row] = []
    missing: list[str] = []
    if all(check.ok for check in checks):
        for n, k in SHAPES:
            found, why = latencies(n, k)
            rows += found
            missing += why
    args.out.write_text(page(machine(), checks, rows, missing))
    sys.stderr.write(f"{args.out} is the report to send back\n")
    return 0 if all(check.ok for check in checks) else 4


if __name__ == "__main__":
    sys.exit(main())
