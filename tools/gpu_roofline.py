"""Roofline of every GPU kernel on three GPUs: bytes, operations, and the time that the data sheet allows. Computed.

python -P tools/gpu_roofline.py --out docs/gpu_roofline.md
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SHAPES = ((4096, 4096), (11008, 4096))
"""out_features N x in_features K."""

TOKENS = (1, 4, 16, 64, 256)
INT4_GROUP = 128

FEW = ((8, 4), (16, 4), (32, 3))
"""Tokens of a block of spmm_24_few, and its stages."""

LATENCY = 700e-9
"""Seconds from a load to its data, from memory; an estimate."""


@dataclass(frozen=True)
class Gpu:
    """What a data sheet promises.

    Attributes:
        name: of the product.
        bytes_per_s: of its memory.
        fp32: operations a second outside tensor cores, a multiply-add counted as two.
        tensor: FP16 or BF16 with FP32 accumulation on tensor cores, dense; 2:4 doubles it.
        processors: how many there are.
        shared_kib: shared memory of a processor.
    """

    name: str
    bytes_per_s: float
    fp32: float
    tensor: float
    processors: int
    shared_kib: int


GPUS = (
    Gpu("A100 SXM 80 GB", 2.039e12, 19.5e12, 312e12, 108, 164),
    Gpu("H100 SXM", 3.35e12, 67e12, 989.4e12, 132, 228),
    Gpu("RTX 4090", 1.008e12, 82.6e12, 165.2e12, 128, 100),
)


@dataclass(frozen=True)
class Kernel:
    """A kernel, its bytes and its operations for M tokens, N rows and K columns.

    Attributes:
        name: as in cuda/kernels.h.
        weight: bytes of one weight of the dense matrix, metadata included.
        activation: bytes of one activation.
        operations: of one weight of the dense matrix and one token.
        peak: the rate at which they run; None where only memory counts.
        fewest: tokens from which it is used.
        most: tokens up to which it is used.
    """

    name: str
    weight: float
    activation: float
    operations: float
    peak: Callable[[Gpu], float] | None
    fewest: int = 1
    most: int = 1 << 30

    def bytes(self, m: int, n: int, k: int) -> float:
        """Weight, activations and bias read once, outputs written once."""
        return n * k * self.weight + m * k * self.activation + 2 * m * n + 4 * n

    def seconds(self, gpu: Gpu, m: int, n: int, k: int) -> tuple[float, bool]:
        """The larger of the times for memory and arithmetic, and whether it is that of memory."""
        memory = self.bytes(m, n, k) / gpu.bytes_per_s
        arithmetic = m * n * k * self.operations / self.peak(gpu) if self.peak else 0.0
        return max(memory, arithmetic), memory >= arithmetic


KERNELS = (
    Kernel("dense FP16 product", 2, 2, 2, lambda gpu: gpu.tensor),
    Kernel("spmm_24_decode", 2 / 2 + 1 / 8, 2, 1, lambda gpu: gpu.fp32, most=16),
    Kernel("spmm_24_few", 2 / 2 + 1 / 8, 2, 2, lambda gpu: 2 * gpu.tensor, fewest=2, most=64),
    Kernel("spmm_24_prefill", 2 / 2 + 1 / 8, 2, 2, lambda gpu: 2 * gpu.tensor, fewest=16),
    Kernel("spmm_24_int4", 0.5 / 2 + 1 / 8 + 2 / INT4_GROUP, 1, 0, None, most=16),
    Kernel("spmm_bitmask_decode, 50 %", 2 / 2 + 1 / 8, 2, 1, lambda gpu: gpu.fp32, most=16),
    Kernel("spmm_bitmask_prefill, 50 %", 2 / 2 + 1 / 8, 2, 2, lambda gpu: gpu.tensor, fewest=16),
)

STREAMS = (
    ("gather_channels, M = 256", lambda n, k: 256 * k * (2 + 2) + 8 * k),
    ("rate_mask_forward", lambda n, k: n * k * (4 + 2 + 4) + 4 * n),
    ("rate_mask_backward, both gradients", lambda n, k: n * k * ((4 + 2 + 4) + (4 + 2 + 4)) + 4 * n * 101),
)
"""Kernels that only move data: bytes for N rows and K columns. float32 weights, int16 ranks, 101 candidates."""


def page() -> str:
    """The tables in markdown."""
    lines = [
        "# Rooflines of the GPU kernels",
        "",
        "Written by `python -P tools/gpu_roofline.py --out docs/gpu_roofline.md`. Everything here is computed from",
        "formulas and data sheets; nothing was measured. A time is the larger of bytes over bandwidth (m) and",
        "operations over peak (a). A launch, some microseconds, is not in it, nor the instructions that unpack.",
        "",
        "| GPU | memory | FP32 | tensor cores, FP32 sums | 2:4 tensor cores |",
        "|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        lines.append(
            f"| {gpu.name} | {gpu.bytes_per_s / 1e9:.0f} GB/s | {gpu.fp32 / 1e12:.1f} TFLOP/s "
            f"| {gpu.tensor / 1e12:.1f} TFLOP/s | {2 * gpu.tensor / 1e12:.1f} TFLOP/s |"
        )
    for n, k in SHAPES:
        lines += _products(n, k)
    lines += _in_flight()
    lines += _streams()
    return "\n".join(lines) + "\n"


def _products(n: int, k: int) -> list[str]:
    head = "| M | kernel | MB | GFLOP | " + " | ".join(gpu.name for gpu in GPUS) + " |"
    lines = ["", f"## N x K = {n} x {k}, 16-bit activations", "", head, "|---|---|---|---|" + "---|" * len(GPUS)]
    for m in TOKENS:
        for kernel in KERNELS:
            if not kernel.fewest <= m <= kernel.most:
                continue
            cells = []
            for gpu in GPUS:
                seconds, memory = kernel.seconds(gpu, m, n, k)
                cells.append(f"{seconds * 1e6:.1f} us ({'m' if memory else 'a'})")
            work = f"{m * n * k * kernel.operations / 1e9:.2f}" if kernel.peak else "-"
            lines.append(f"| {m} | {kernel.name} | {kernel.bytes(m, n, k) / 1e6:.1f} | {work} | {' | '.join(cells)} |")
    return lines


def _in_flight() -> list[str]:
    """Whether spmm_24_few asks for enough at once: bytes under way against bandwidth times latency."""
    lines = [
        "",
        "## What spmm_24_few keeps on the way [est]",
        "",
        "Weights only. To keep the memory busy, bandwidth x latency must be on the way; the latency,",
        f"{LATENCY * 1e9:.0f} ns, is an estimate, so all of this is. Resident: blocks a processor holds by its shared",
        "memory (1 KiB of each block is the system's). On the way: of all processors, for the blocks there are.",
        "",
        "| N | tokens | KiB a block | blocks | "
        + " | ".join(f"{g.name}: resident, on the way, wanted" for g in GPUS)
        + " |",
        "|---|---|---|---|" + "---|" * len(GPUS),
    ]
    for n, _ in SHAPES:
        for tokens, stages in FEW:
            stage = 32 * 64 + tokens * 128 + 32 * 8
            kib, blocks = 4 * stages * stage / 1024, -(-n // 32)
            cells = []
            for gpu in GPUS:
                resident = int(gpu.shared_kib // (kib + 1))
                under_way = min(blocks, resident * gpu.processors) * 4 * (stages - 1) * (32 * 64 + 32 * 8)
                wanted = gpu.bytes_per_s * LATENCY
                cells.append(f"{resident}, {under_way / 1e6:.1f} MB, {wanted / 1e6:.1f} MB")
            lines.append(f"| {n} | {tokens} | {kib:.0f} | {blocks} | {' | '.join(cells)} |")
    return lines


def _streams() -> list[str]:
    lines = [
        "",
        "## Kernels that only move data",
        "",
        "| N x K | kernel | MB | " + " | ".join(g.name for g in GPUS) + " |",
    ]
    lines.append("|---|---|---|" + "---|" * len(GPUS))
    for n, k in SHAPES:
        for name, size in STREAMS:
            cells = [f"{size(n, k) / gpu.bytes_per_s * 1e6:.1f} us" for gpu in GPUS]
            lines.append(f"| {n} x {k} | {name} | {size(n, k) / 1e6:.1f} | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Write or print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page to write; standard output if not given")
    args = parser.parse_args(arguments)
    if args.out:
        args.out.write_text(page())
    else:
        sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
