"""How fast the sparse ops are inside ONNX Runtime, against its dense float32 MatMul, and against this machine's limits.

    python -P tools/bench_kernels.py                     # everything, some minutes
    python -P tools/bench_kernels.py --op nm --tokens 1 --shape 4096x4096 --json

Sparse and dense run in turns, so that both see the same disturbances; the ratio is the median of the ratios of
neighbours. With one token a session holds as many layers as make 200 MB of packed weights (at most 64), so that they
come from memory as they do in a model; the time is that of one layer. With more tokens it holds one layer. With
--threads 1 everything runs in the calling thread and its processor time is taken, which other processes on the machine
do not stretch (they still share memory and caches). The floor is
the larger of (bytes / read bandwidth) and (operations on kept weights / peak), both measured here in the same minute.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import sparsify_export
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table
from sparsify_export import _native

LIBRARY = str(Path(sparsify_export.__file__).with_name("libsparsify_ort.so"))
TYPES = {"f32": (TensorProto.FLOAT, 4), "f16": (TensorProto.FLOAT16, 2), "bf16": (TensorProto.BFLOAT16, 2)}
SHAPES = ["4096x4096", "11008x4096", "576x576", "192x576", "1536x576", "576x1536"]


def tensor(name: str, kind: int, array: np.ndarray, shape: tuple[int, ...] | None = None) -> onnx.TensorProto:
    """An initializer from the bytes of ``array``."""
    return helper.make_tensor(name, kind, shape or array.shape, array.tobytes(), raw=True)


def session(
    layers: list[tuple[onnx.NodeProto, list[onnx.TensorProto]]], cols: int, threads: int
) -> Callable[..., None]:
    """Run layers one after the other, as a model does, each on x [M, cols] and with its own weights."""
    nodes, weights, outputs = [], [], []
    for number, (node, inits) in enumerate(layers):
        for init in inits:
            init.name += str(number)
        node.input[1:] = [init.name for init in inits]
        node.output[0] = f"y{number}"
        nodes.append(node)
        weights.extend(inits)
        outputs.append(helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, None))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", cols])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("sparsify", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], outputs, weights), opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(LIBRARY)
    with tempfile.TemporaryDirectory() as folder:  # a file of its own for the weights: protobuf ends at 2 GB
        path = str(Path(folder) / "model.onnx")
        onnx.save(model, path, save_as_external_data=True, location="weights")
        ready = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: ready.run(None, {"x": x})


def halves(values: np.ndarray, kind: str) -> np.ndarray:
    """Values in the stored type; bfloat16 by cutting the lower bits, good enough for timing."""
    if kind == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"f32": np.float32, "f16": np.float16}[kind])


def sparse_nm(rng: np.random.Generator, rows: int, cols: int, kind: str, n: int, m: int):
    """A random n:m layer: node, weights and packed bytes."""
    bits = 1 if m == 2 else 2 if m <= 4 else 4 if m <= 16 else 8
    kept = cols // m * n
    order = rng.random((rows, cols // m, m), np.float32).argsort(axis=-1)[..., :n]
    position = np.sort(order, axis=-1).reshape(rows, kept, 1).astype(np.uint8)
    indices = np.packbits(
        (position >> np.arange(bits, dtype=np.uint8) & 1).reshape(rows, -1), axis=1, bitorder="little"
    )
    values = halves(rng.standard_normal((rows, kept), np.float32), kind)
    inits = [tensor("v", TYPES[kind][0], values), tensor("i", TensorProto.UINT8, indices)]
    node = helper.make_node("linear_nm", ["x", "v", "i"], ["y"], domain="sparsify", n=n, m=m)
    return (node, inits), values.nbytes + indices.nbytes


def sparse_bitmask(rng: np.random.Generator, rows: int, cols: int, kind: str, density: float):
    """A random unstructured layer: node, weights and packed bytes."""
    keep = rng.random((rows, cols), np.float32) < density
    values = halves(rng.standard_normal(int(keep.sum()), np.float32), kind)
    mask, starts = np.packbits(keep, axis=1, bitorder="little"), np.r_[0, keep.sum(axis=1).cumsum()].astype(np.int64)
    inits = [tensor("v", TYPES[kind][0], values), tensor("k", TensorProto.UINT8, mask)]
    node = helper.make_node("linear_bitmask", ["x", "v", "k", "r"], ["y"], domain="sparsify", in_features=cols)
    return (node, [*inits, tensor("r", TensorProto.INT64, starts)]), values.nbytes + mask.nbytes


def dense(rng: np.random.Generator, rows: int, cols: int) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """The dense float32 layer."""
    weight = tensor("w", TensorProto.FLOAT, rng.standard_normal((cols, rows), np.float32))
    return helper.make_node("MatMul", ["x", "w"], ["y"]), [weight]


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call."""
    start = clock()
    call()
    return clock() - start


def clock_for(threads: int) -> Callable[[], float]:
    """Wall time, or for one thread its processor time."""
    return time.thread_time if threads == 1 else time.perf_counter


def limits(threads: int) -> tuple[float, float]:
    """Read bandwidth in byte/s and peak in flop/s, the best of a few tries."""
    _native.set_num_threads(threads)
    data = np.ones(64 << 20, np.float32)
    clock = clock_for(threads)
    bandwidth = data.nbytes / min(seconds(lambda: _native.read_all(data), clock) for _ in range(7))
    steps = 20_000 if _native.isa() != "portable" else 1_000_000
    flops = _native.fma_burst(1)
    peak = flops * steps / min(seconds(lambda: _native.fma_burst(steps), clock) for _ in range(7))
    return bandwidth, peak


def measure(make: Callable, make_dense: Callable, tokens: int, cols: int, threads: int, budget: float):
    """Median seconds of one layer of each, the median ratio of neighbours, our best, bytes of a layer, runs."""
    first, size = make()
    copies = min(64, -(-200_000_000 // size)) if tokens == 1 else 1
    sparse = session([first, *(make()[0] for _ in range(copies - 1))], cols, threads)
    ordinary = session([make_dense() for _ in range(copies)], cols, threads)
    x = np.random.default_rng(1).standard_normal((tokens, cols), np.float32)
    for _ in range(2):
        sparse(x), ordinary(x)
    ours, theirs, clock = [], [], clock_for(threads)
    deadline = time.perf_counter() + budget
    while len(ours) < 7 or (time.perf_counter() < deadline and len(ours) < 3000):
        ours.append(seconds(lambda: sparse(x), clock) / copies)
        theirs.append(seconds(lambda: ordinary(x), clock) / copies)
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return statistics.median(ours), statistics.median(theirs), ratio, min(ours), size, len(ours)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=["nm", "bitmask"], choices=["nm", "bitmask"])
    parser.add_argument("--type", nargs="+", default=["f32"], choices=list(TYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--shape", nargs="+", default=SHAPES[:1], help="NxK, or all", metavar="NxK")
    parser.add_argument("--nm", default="2:4", help="pattern of linear_nm (default %(default)s)")
    parser.add_argument("--density", type=float, default=0.5, help="of linear_bitmask (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each line")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    n, m = map(int, args.nm.split(":"))
    shapes = SHAPES if args.shape == ["all"] else args.shape
    results = []
    for rows, cols in (map(int, shape.split("x")) for shape in shapes):
        for op in args.op:
            for kind in args.type:
                for tokens in args.tokens:
                    rng = np.random.default_rng(0)
                    bandwidth, peak = limits(args.threads)

                    def make(op=op, kind=kind, rows=rows, cols=cols, rng=rng):
                        if op == "nm":
                            return sparse_nm(rng, rows, cols, kind, n, m)
                        return sparse_bitmask(rng, rows, cols, kind, args.density)

                    ours, theirs, ratio, best, size, runs = measure(
                        make,
                        lambda rows=rows, cols=cols, rng=rng: dense(rng, rows, cols),
                        tokens,
                        cols,
                        args.threads,
                        args.seconds,
                    )
                    density = n / m if op == "nm" else args.density
                    floor = max(size / bandwidth, 2 * density * rows * cols * tokens / peak)
                    results.append(
                        {
                            "op": f"linear_nm {args.nm}" if op == "nm" else f"linear_bitmask {args.density:.0%}",
                            "type": kind,
                            "shape": f"{rows}x{cols}",
                            "tokens": tokens,
                            "sparse_us": ours * 1e6,
                            "sparse_best_us": best * 1e6,
                            "dense_f32_us": theirs * 1e6,
                            "speedup": ratio,
                            "fraction_of_floor": floor / ours,
                            "bandwidth_gb_s": bandwidth / 1e9,
                            "peak_gflop_s": peak / 1e9,
                            "runs": runs,
                        }
                    )
    if args.json:
        json.dump({"isa": _native.isa(), "threads": args.threads, "results": results}, sys.stdout, indent=1)
        return
    table = Table(
        title=f"{_native.isa()}, {args.threads} threads, against ONNX Runtime {onnxruntime.__version__} dense f32"
    )
    for column in (
        "op",
        "type",
        "N x K",
        "tokens",
        "sparse us",
        "best us",
        "dense us",
        "speedup",
        "of floor",
        "GB/s",
        "GFLOP/s",
    ):
        table.add_column(column, justify="left" if column in ("op", "type", "N x K") else "right")
    for row in results:
        table.add_row(
            row["op"],
            row["type"],
            row["shape"],
            str(row["tokens"]),
            f"{row['sparse_us']:.1f}",
            f"{row['sparse_best_us']:.1f}",
            f"{row['dense_f32_us']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['fraction_of_floor']:.0%}",
            f"{row['bandwidth_gb_s']:.0f}",
            f"{row['peak_gflop_s']:.0f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
