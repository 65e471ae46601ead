"""Measure, once, how fast this machine runs dense and sparse ops inside ONNX Runtime, and remember it."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped]
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from .. import _native
from ..calibrate.masks import nm_keep_mask
from ..calibrate.patterns import NM, Pattern, Unstructured
from ..passes.cost import DENSE, TOKENS, Speed, Worth, fit, format_name, why_dense
from ..passes.dialect import packed
from ..passes.dialect.packed import Packed
from ..passes.dialect.storage import Storage
from . import library_path

FEATURES = 2048
"""Rows and columns of the layers that are timed, or the next multiple of m below."""

TINY = 32
"""The same of the layers that show what an op costs without work."""

STREAMED = 128 << 20
"""Bytes of weights that one run reads at one token, so that they come from memory and not from a cache."""

MOST_LAYERS = 64
RUNS = {1: 15, 16: 7, 256: 5}
"""How often a session of so many tokens is timed; the best counts."""

DENSITIES = (0.5, 0.2)
"""Where unstructured weights are timed."""

Layer = Mapping[str, Tensor] | Packed
"""A dense layer's ``weight``, or a packed one."""


@dataclass
class Machine:
    """Speeds of this machine, measured when they are asked for the first time.

    Attributes:
        key: what the figures hold for: processor, instruction set, versions, threads.
        speeds: by ``format_name``, and the dense one as ``MatMul``.
        file: where they are kept; None keeps nothing.
    """

    key: Mapping[str, str | int]
    speeds: dict[str, Speed] = field(default_factory=dict)
    file: Path | None = None

    def worth(self, storage: Storage, *, tokens: int) -> Worth:
        """The decision for weights stored so, in calls of ``tokens`` tokens."""

        def decide(pattern: Pattern, out_features: int, in_features: int, nonzeros: int) -> str:
            density = nonzeros / (out_features * in_features)
            return why_dense(
                self.sparse(pattern, storage),
                self.dense(),
                out_features=out_features,
                in_features=in_features,
                density=density,
                tokens=tokens,
            )

        return decide

    def dense(self) -> Speed:
        """Of dense float32 products."""
        return self._speed(DENSE, measure_dense)

    def sparse(self, pattern: Pattern, storage: Storage) -> Speed:
        """Of the op that stores weights so."""
        return self._speed(format_name(pattern, storage), lambda: measure_sparse(pattern, storage))

    def _speed(self, name: str, measure: Callable[[], Speed]) -> Speed:
        if name not in self.speeds:
            self.speeds[name] = measure()
            if self.file is not None:
                _write(self.file, self.key, self.speeds)
        return self.speeds[name]


def this_machine() -> Machine:
    """The machine we run on, with what earlier runs measured; a file that is damaged or of another key is not used."""
    key: dict[str, str | int] = {
        "processor": _processor(),
        "isa": _native.isa(),
        "onnxruntime": ort.__version__,
        "sparsify-export": importlib.metadata.version("sparsify-export"),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = root / "sparsify-export" / f"machine-{digest}.json"
    return Machine(key, _read(file, key), file)


def measure_dense() -> Speed:
    """Time dense float32 products."""
    return _measure({1.0: lambda features: {"weight": _random(features)}}, FEATURES, TINY)


def measure_sparse(pattern: Pattern, storage: Storage) -> Speed:
    """Time a sparse op; unstructured weights at two densities, whatever the sparsity of ``pattern``."""
    if isinstance(pattern, NM):
        group, makers = pattern.m, {pattern.n / pattern.m: _packer(pattern, storage)}
    else:
        group, makers = 1, {density: _packer(Unstructured(1 - density), storage) for density in DENSITIES}
    return _measure(makers, FEATURES // group * group, max(TINY // group, 1) * group)


def _measure(makers: Mapping[float, Callable[[int], Layer]], features: int, tiny: int) -> Speed:
    first = next(iter(makers.values()))
    overhead = _seconds(first(tiny), tiny, 1, MOST_LAYERS)
    seconds = {}
    for density, make in makers.items():
        layer = make(features)
        size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(layer).values())
        many = min(MOST_LAYERS, -(-STREAMED // size))
        times = [_seconds(layer, features, tokens, many if tokens == 1 else 4) for tokens in TOKENS]
        seconds[density] = tuple(max(t - overhead, 0.0) / features**2 for t in times)
    return fit(overhead, seconds)


def _packer(pattern: Pattern, storage: Storage) -> Callable[[int], Layer]:
    def make(features: int) -> Layer:
        weight = _random(features)
        if isinstance(pattern, NM):
            keep = nm_keep_mask(weight.abs(), pattern)
        else:
            keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) >= pattern.sparsity
        return packed.pack(weight * keep, pattern, storage)

    return make


def _random(features: int) -> Tensor:
    """A square weight that keeps the size of what it is applied to, however often."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(features, features, generator=generator).div(features**0.5)


def _tensors(layer: Layer) -> Mapping[str, Tensor]:
    return layer.tensors if isinstance(layer, Packed) else layer


def _seconds(layer: Layer, features: int, tokens: int, layers: int) -> float:
    """Seconds of one of ``layers`` equal layers in a row, each with its own copy of the weight: the best run."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    model = ir.to_proto(_chain(layer, features, layers)).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    del model
    feed = {"x0": np.random.default_rng(0).standard_normal((tokens, features), np.float32)}
    session.run(None, feed)
    times = []
    for _ in range(RUNS[tokens]):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return min(times) / layers


def _chain(layer: Layer, features: int, layers: int) -> ir.Model:
    """A model of equal layers, one behind the other."""
    float_type = ir.TensorType(ir.DataType.FLOAT)
    x = [ir.Value(name=f"x{i}", type=float_type, shape=ir.Shape(["tokens", features])) for i in range(layers + 1)]
    nodes, initializers = [], []
    for number in range(layers):
        weights = []
        for name, tensor in _tensors(layer).items():
            # ONNX Runtime keeps equal dense weights once, so each layer has its rows in an order of its own.
            own = tensor if isinstance(layer, Packed) else tensor.roll(number, 0)
            stored = TorchTensor(own, name=f"{name}{number}")
            weights.append(ir.Value(name=stored.name, const_value=stored, type=ir.TensorType(stored.dtype)))
        initializers += weights
        if isinstance(layer, Packed):
            op, domain, attributes = layer.op, "sparsify", dict(layer.attributes)
        else:
            op, domain, attributes = "MatMul", "", {}
        given = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        nodes.append(ir.Node(domain, op, [x[number], *weights], given, outputs=[x[number + 1]]))
    graph = ir.Graph(
        x[:1], x[-1:], nodes=nodes, initializers=initializers, opset_imports={"": 23, "sparsify": 1}, name="chain"
    )
    return ir.Model(graph, ir_version=10)


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(file: Path, key: Mapping[str, str | int]) -> dict[str, Speed]:
    """What the file holds; nothing where there is none, it is damaged, or it is about another machine."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        if content["key"] != key:
            return {}
        return {
            name: Speed(float(s["overhead"]), tuple(map(float, s["empty"])), tuple(map(float, s["full"])))
            for name, s in content["speeds"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(file: Path, key: Mapping[str, str | int], speeds: Mapping[str, Speed]) -> None:
    """Keep the figures for the next run; where that is not possible, the next run measures again."""
    content = {"key": key, "speeds": {name: asdict(speed) for name, speed in speeds.items()}}
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
