"""What the statistics and the weight updates cost in time and memory, against R, C and tokens, beside the formula.

    MALLOC_MMAP_THRESHOLD_=65536 python -P tools/bench_updates.py [--sizes 512,1024,2048] [--tokens 8192]

R = out_features, C = in_features. Random weights and correlated inputs. For every method R and C are doubled one after
the other; the time should grow as the formula does.
Operations count a multiplication and an addition as two; memory is what a step takes beyond its arguments. With the
variable glibc gives freed matrices back to the system, without it they hide what the next step takes.
"""

import json as js
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from cyclopts import run
from rich.console import Console
from rich.table import Table
from sparsify_export.calibrate import scores
from sparsify_export.calibrate.admm import ITERATIONS as ADMM
from sparsify_export.calibrate.alps import ITERATIONS as ALPS
from sparsify_export.calibrate.hessian import Hessian
from sparsify_export.calibrate.masked_cg import ITERATIONS as CG
from sparsify_export.calibrate.masks import keep_mask
from sparsify_export.calibrate.patterns import NM
from sparsify_export.calibrate.statistics import ActNorm
from sparsify_export.calibrate.update import Method, prepare, update
from sparsify_export.passes.fx.attended import averages
from sparsify_export.stages import Stages
from torch import Tensor

PATTERN = NM(2, 4)
WINDOW, HEAD = 1024, 64
"""W, the tokens that an attention looks over at most, and channels of a head."""

FORMULAS: dict[str, tuple[str, Callable[[int, int, int], float], str, Callable[[int, int, int], float]]] = {
    "norms": ("2 T C", lambda r, c, t: 2 * t * c, "4 C", lambda r, c, t: 4 * c),
    "Hessian": ("T C^2", lambda r, c, t: t * c * c, "8 C^2", lambda r, c, t: 8 * c * c),
    "averages": (f"2 W T (C + {HEAD})", lambda r, c, t: 2 * min(t, WINDOW) * t * (c + HEAD), "8 T C",
                 lambda r, c, t: 8 * t * c),
    "RIA and mask": ("10 R C", lambda r, c, t: 10 * r * c, "8 R C", lambda r, c, t: 8 * r * c),
    "inverse": ("C^3", lambda r, c, t: c**3, "24 C^2", lambda r, c, t: 24 * c * c),
    "sparsegpt": ("R C^2 + C^3/3", lambda r, c, t: r * c * c + c**3 / 3, "12 R C + 16 C^2",
                  lambda r, c, t: 12 * r * c + 16 * c * c),
    "admm": (f"{ADMM + 1} 2 R C^2", lambda r, c, t: (ADMM + 1) * 2 * r * c * c, "24 R C + 4 C^2",
             lambda r, c, t: 24 * r * c + 4 * c * c),
    "eigenvectors": ("9 C^3", lambda r, c, t: 9 * c**3, "32 C^2", lambda r, c, t: 32 * c * c),
    "alps": (f"{2 * ALPS + CG + 2} 2 R C^2 at most", lambda r, c, t: (2 * ALPS + CG + 2) * 2 * r * c * c,
             "24 R C + 4 C^2", lambda r, c, t: 24 * r * c + 4 * c * c),
    "cg": (f"{CG + 1} 2 R C^2", lambda r, c, t: (CG + 1) * 2 * r * c * c, "24 R C", lambda r, c, t: 24 * r * c),
}  # fmt: skip
"""Operations and bytes of each step."""


@dataclass(frozen=True)
class Cost:
    """One measured step."""

    step: str
    rows: int
    columns: int
    tokens: int
    seconds: float
    bytes: int
    operations: float
    expected_bytes: float


def main(*, sizes: str = "512,1024,2048", tokens: int = 8192, json: bool = False) -> None:
    """Measure every step for every pair of sizes.

    Args:
        sizes: of R and of C, with commas between them.
        tokens: of the inputs, a multiple of 2,048 or less than that; half of them are measured as well.
        json: print JSON.
    """
    wanted = [int(size) for size in sizes.split(",")]
    costs = [cost for c in wanted for r in wanted for cost in measure(r, c, tokens)]
    costs += [
        cost for cost in measure(wanted[0], wanted[-1], tokens // 2) if cost.step in ("norms", "Hessian", "averages")
    ]
    if json:
        print(js.dumps([asdict(cost) for cost in costs]))
        return
    table = Table(title=f"{torch.get_num_threads()} threads")
    for name in ("step", "R", "C", "T", "operations", "seconds", "GFLOP/s", "bytes", "measured MB", "formula MB"):
        table.add_column(name, justify="left" if name in ("step", "operations", "bytes") else "right")
    for cost in sorted(costs, key=lambda cost: (list(FORMULAS).index(cost.step), cost.columns, cost.rows)):
        table.add_row(
            cost.step,
            str(cost.rows),
            str(cost.columns),
            str(cost.tokens),
            FORMULAS[cost.step][0],
            f"{cost.seconds:.4f}",
            f"{cost.operations / cost.seconds / 1e9:.1f}",
            FORMULAS[cost.step][2],
            f"{cost.bytes / 1e6:.1f}",
            f"{cost.expected_bytes / 1e6:.1f}",
        )
    Console(width=140).print(table)


def measure(rows: int, columns: int, tokens: int) -> list[Cost]:
    """Every step twice: the first time for its memory, the second for its time."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ mix
    weight = torch.randn(rows, columns, generator=generator)
    costs: list[Cost] = []

    def step(name: str, work: Callable[[], object]) -> None:
        stages = Stages()
        with stages.run("before"):
            pass
        with stages.run(name):
            work()
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        taken = max(0, stages.done[1].peak_bytes - stages.done[0].peak_bytes)
        shape = (rows, columns, tokens)
        costs.append(Cost(name, *shape, seconds, taken, FORMULAS[name][1](*shape), FORMULAS[name][3](*shape)))

    norms, hessian = ActNorm(columns), Hessian(columns)
    step("norms", lambda: norms.update(x))
    step("Hessian", lambda: hessian.update(x))
    windows = x.reshape(-1, min(tokens, WINDOW), columns)
    queries = torch.randn(len(windows), max(1, columns // HEAD), windows.shape[1], HEAD, generator=generator)
    step("averages", lambda: averages((queries, queries, None), {"is_causal": True}, windows, None))
    norm, matrix = norms.norm(), hessian.matrix()
    mask: list[Tensor] = []
    step("RIA and mask", lambda: mask.append(keep_mask(scores.ria(weight, norm, 0.5), PATTERN, "matrix")))
    step("inverse", lambda: prepare(matrix, "admm"))
    step("eigenvectors", lambda: prepare(matrix, "alps"))
    methods: tuple[Method, ...] = ("sparsegpt", "admm", "alps", "cg")
    for method in methods:
        inputs = prepare(matrix, method)
        target = mask[-1] if method == "cg" else PATTERN
        step(method, lambda inputs=inputs, target=target: update(weight, inputs, target, per="matrix"))  # type: ignore[misc]
    return costs


if __name__ == "__main__":
    run(main)
