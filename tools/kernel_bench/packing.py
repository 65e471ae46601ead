"""How long packing takes: ``pack`` of the dialect on fp32 weights of one gigabyte in all."""

import time

import torch
from kernel_bench.layers import random_weight
from kernel_bench.rows import Row
from sparsify_export import _native
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.dialect.packed import pack
from sparsify_export.passes.dialect.storage import Storage


def measure_packing(row: Row, gigabytes: float, threads: int) -> dict:
    """Pack a row's weight as often as makes ``gigabytes`` (10^9 bytes) of fp32 weights; seconds are for all of it."""
    torch.set_num_threads(threads)
    _native.set_num_threads(threads)
    weight = torch.from_numpy(random_weight(row)[0])
    count = max(1, round(gigabytes * 1e9 / weight.nbytes))
    pattern = NM(*row.nm) if row.format == "nm" else Unstructured(row.sparsity)
    kind = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "i4": "int4"}[row.type]
    storage = Storage(kind, row.group if row.type == "i4" else 0)
    start = time.perf_counter()
    for _ in range(count):
        pack(weight, pattern, storage)
    seconds = time.perf_counter() - start
    packed = count * weight.nbytes
    return {
        "kernel": row.kernel,
        "shape": row.shape,
        "bytes": packed,
        "seconds": seconds,
        "seconds_per_gb": seconds / packed * 1e9,
    }


def packing_table(records: list[dict]) -> list[list[str]]:
    """A head and one line for each format and type."""
    lines = [["kernel", "N x K", "GB", "s", "s a GB"]]
    for line in records:
        size = f"{line['bytes'] / 1e9:.2f}"
        lines.append([line["kernel"], line["shape"], size, f"{line['seconds']:.2f}", f"{line['seconds_per_gb']:.2f}"])
    return lines
