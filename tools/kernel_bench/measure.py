"""Time a row against its opponents and against this machine's limits."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from kernel_bench import layers
from kernel_bench.contestants import Contestant, DeepSparse, OnnxRuntime, Work, clock_for
from kernel_bench.rows import Row
from sparsify_export import _native


@dataclass(frozen=True)
class Against:
    """An opponent's time for one layer, and the median ratio of neighbouring runs."""

    us: float
    speedup: float


@dataclass(frozen=True)
class Result:
    """A row's times for one layer. ``fraction_of_floor`` is 1 where nothing could be faster."""

    row: Row
    us: float
    best_us: float
    runs: int
    weight_bytes: int
    bandwidth_gb_s: float
    peak_gflop_s: float
    floor_us: float
    fraction_of_floor: float
    against: dict[str, Against]


# How far a result may be from the float32 weight's, as a fraction of its size: what the stored type costs, twice over.
# This tells a kernel from one that computes something else; how exact kernels are, their tests say.
ALLOWED = {"f32": 1e-4, "bf16": 0.02, "f16": 0.002, "i8": 0.03, "i4": 0.3}


def check(row: Row, x: np.ndarray, y: np.ndarray) -> None:
    """Compare y [M, N] of x [M, K] with plain numpy on up to 16 tokens.

    Raises:
        RuntimeError: it is another matrix product.
    """
    x, y = x[:16], y[:16]
    wanted = x @ layers.random_weight(row)[0].T
    off = float(np.linalg.norm(y - wanted) / np.linalg.norm(wanted))
    if not off <= ALLOWED[row.type]:
        raise RuntimeError(f"{row.shape} {row.kernel}, M = {row.tokens}: the kernel's result is off by {off:.2g}")


def read_bandwidth(threads: int) -> float:
    """Byte/s, the best of a few tries."""
    _native.set_num_threads(threads)
    data = np.ones(64 << 20, np.float32)
    return data.nbytes / _best_seconds(lambda: _native.read_all(data), threads)


def fma_peak(threads: int) -> float:
    """Flop/s of float32 FMA, the best of a few tries."""
    _native.set_num_threads(threads)
    steps = 20_000 if _native.isa() != "portable" else 1_000_000
    flops = _native.fma_burst(1)
    return flops * steps / _best_seconds(lambda: _native.fma_burst(steps), threads)


def _best_seconds(call, threads: int) -> float:
    clock, times = clock_for(threads), []
    for _ in range(7):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def peak(row: Row, threads: int) -> float:
    """Dense-equivalent operations a second that a kernel may reach on this row, the best of a few tries.

    On tiles every zero is multiplied too, and 4-bit codes take two products in bfloat16: the products of tiles are
    measured. Elsewhere only kept weights count, and the peak of float32 FMA is measured; vdpbf16ps makes twice as many
    in an instruction, vpdpbusd four times.
    """
    isa = _native.isa()
    tiles = {"bf16": ("bf16", 1), "i8": ("int8", 1), "i4": ("bf16", 2)}.get(row.type)
    if tiles and isa == "amx" and row.tokens > 2:
        _native.set_num_threads(threads)
        name, products = tiles
        steps = 4_000
        seconds = _best_seconds(lambda: _native.tile_burst(steps, name), threads)
        return _native.tile_burst(1, name) * steps / seconds / products
    factors = {
        "bf16": 2 * (isa in ("avx512bf16", "amx")),
        "i8": 4 * isa.startswith(("avx512vnni", "avx512bf16", "amx")),
    }
    return fma_peak(threads) * (factors.get("i8" if row.type == "i4" else row.type) or 1) / row.density


class Bench:
    """Keeps opponents from row to row: they do not depend on our format."""

    def __init__(self, *, threads: int, seconds: float, megabytes: float, deepsparse: str | None):
        self.threads = threads
        self.seconds = seconds
        self.megabytes = megabytes
        self.python = deepsparse
        self._work: Work | None = None
        self._opponents: dict[object, Contestant] = {}

    def row(self, row: Row, against: Iterable[str]) -> Result:
        """Measure a row against opponents by name; "deepsparse" needs the interpreter."""
        work = Work(row.tokens, row.rows, row.cols, self.threads, self.megabytes)
        if work != self._work:
            self.close()
            self._work = work
        bandwidth = read_bandwidth(self.threads)
        top = peak(row, self.threads)
        layer = layers.sparse(row)
        ours = OnnxRuntime(layer, work)
        ours()
        check(row, ours.x, ours.y)
        ours_times, theirs = alternate(ours, {name: self._opponent(name, row, work) for name in against}, self.seconds)
        floor = max(layer.nbytes / bandwidth, 2 * row.rows * row.cols * row.tokens / top)
        us = statistics.median(ours_times) * 1e6
        return Result(
            row=row,
            us=us,
            best_us=min(ours_times) * 1e6,
            runs=len(ours_times),
            weight_bytes=layer.nbytes,
            bandwidth_gb_s=bandwidth / 1e9,
            peak_gflop_s=top / 1e9,
            floor_us=floor * 1e6,
            fraction_of_floor=floor * 1e6 / us,
            against={
                name: Against(
                    us=statistics.median(b for _, b in pairs) * 1e6,
                    speedup=statistics.median(b / a for a, b in pairs),
                )
                for name, pairs in theirs.items()
            },
        )

    def _opponent(self, name: str, row: Row, work: Work) -> Contestant:
        if name != "deepsparse":
            if name not in self._opponents:
                self._opponents[name] = OnnxRuntime(layers.opponent(name, row.rows, row.cols), work)
            return self._opponents[name]
        key = (row.format, row.nm if row.format == "nm" else row.sparsity)
        if key not in self._opponents:
            self._end_deepsparse()
            pruned = layers.pruned_dense(row)
            self._opponents[key] = DeepSparse(self.python, pruned, row.density, work)
        return self._opponents[key]

    def _end_deepsparse(self) -> None:
        for key, value in list(self._opponents.items()):
            if isinstance(value, DeepSparse):
                value.close()
                del self._opponents[key]

    def close(self) -> None:
        """Let all opponents go."""
        self._end_deepsparse()
        self._opponents.clear()


def alternate(
    ours: Contestant, opponents: dict[str, Contestant], seconds: float
) -> tuple[list[float], dict[str, list[tuple[float, float]]]]:
    """Run ours before every run of an opponent, for ``seconds`` and at least five rounds.

    Returns:
        All our times, and for each opponent the pairs (ours just before, theirs).
    """
    for _ in range(2):
        ours()
        for run in opponents.values():
            run()
    times: list[float] = []
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in opponents}
    deadline, rounds = time.perf_counter() + seconds, 0
    while rounds < 5 or (time.perf_counter() < deadline and rounds < 3000):
        rounds += 1
        times.append(ours())
        for place, (name, run) in enumerate(opponents.items()):
            if place:
                times.append(ours())
            pairs[name].append((times[-1], run()))
    return times, pairs
