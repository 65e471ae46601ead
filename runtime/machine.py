"""Measure, once, how fast this machine runs dense and sparse ops inside ONNX Runtime, and remember it."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
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
from ..calibrate.masks import keep_mask, nm_keep_mask
from ..calibrate.patterns import NM, Pattern, Unstructured
from ..passes.cost import DENSE, TOKENS, Speed, Worth, fit, format_name, why_dense
from ..passes.dialect import linear_codes, packed
from ..passes.dialect.packed import Packed
from ..passes.dialect.storage import Storage
from ..passes.form import Form
from . import library_path

FEATURES = 2048
"""Rows and columns of the layers that are timed, or the next multiple of m below."""

TINY = 32
"""The same of the layers that show what an op costs without work."""

STREAMED = 128 << 20
"""Bytes of weights that one run reads at one token, so that they come from memory and not from a cache."""

MOST_LAYERS = 64
CYCLED = 64 << 20
"""Bytes of the weights of `seconds` at most: twice the last-level cache of most machines."""
FEW_LAYERS = 4
"""Layers that are timed where weights are read once for many tokens."""
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
        layers: seconds of layers of one size, by what `seconds` was asked.
    """

    key: Mapping[str, str | int]
    speeds: dict[str, Speed] = field(default_factory=dict)
    file: Path | None = None
    layers: dict[str, float] = field(default_factory=dict)

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

    def seconds(
        self, form: Form, out_features: int, in_features: int, *, tokens: int, weights: int, bias: bool
    ) -> float:
        """Of one layer of this size as it runs in a model, measured on such layers.

        Args:
            form: of its weight.
            out_features: of the layer.
            in_features: likewise.
            tokens: of a call.
            weights: numbers in the model's linears together: so many layers run one after the other that all of them
                are as large as the model, or too large for a cache.
            bias: whether it has one.
        """
        size = form.nbytes(out_features, in_features)
        many = min(-(-weights // (out_features * in_features)), -(-CYCLED // size)) if tokens < 16 else FEW_LAYERS
        many = max(FEW_LAYERS, many)
        said = "with bias" if bias else "without bias"
        name = f"{form}, {out_features} x {in_features} {said}, {tokens} tokens, {many} layers"
        if name not in self.layers:
            self.layers[name] = measure_layer(form, out_features, in_features, tokens=tokens, layers=many, bias=bias)
            if self.file is not None:
                _write(self.file, self.key, self.speeds, self.layers)
        return self.layers[name]

    def _speed(self, name: str, measure: Callable[[], Speed]) -> Speed:
        if name not in self.speeds:
            self.speeds[name] = measure()
            if self.file is not None:
                _write(self.file, self.key, self.speeds, self.layers)
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
    speeds, layers = _read(file, key)
    return Machine(key, speeds, file, layers)


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


def measure_layer(form: Form, out_features: int, in_features: int, *, tokens: int, layers: int, bias: bool) -> float:
    """Seconds of one of ``layers`` layers of this size that read the same, each with a weight of its own: the median.

    The weights are random, pruned at random where the form says so.
    """
    nodes: list[ir.Node] = []
    weights: list[ir.Value] = []
    made = []
    float_type, layer = ir.TensorType(ir.DataType.FLOAT), _layer(form, out_features, in_features)
    x = ir.Value(name="x", type=float_type, shape=ir.Shape(["tokens", in_features]))
    shift = torch.linspace(-1, 1, out_features)
    for number in range(layers):
        y = ir.Value(name=f"y{number}", type=float_type, shape=ir.Shape(["tokens", out_features]))
        own = [_stored(f"{name}{number}", _another(layer, tensor, number)) for name, tensor in _tensors(layer).items()]
        shifts = [_stored(f"bias{number}", shift + number)] if bias else []
        weights += [*own, *shifts]
        made.append(y)
        if form.dense:
            product = ir.Value(name=f"product{number}", type=float_type) if bias else y
            nodes.append(ir.Node("", "MatMul", [x, *own], outputs=[product]))
            nodes += [ir.Node("", "Add", [product, *shifts], outputs=[y])] if bias else []
        elif form.storage.blocked:
            given = linear_codes.attributes(form.storage, out_features, in_features)
            numbers = [ir.AttrInt64(name, value) for name, value in given.items()]
            inputs: list[ir.Value | None] = [x, *own, None, None, *shifts]
            nodes.append(ir.Node(linear_codes.DOMAIN, linear_codes.NODE, inputs, numbers, outputs=[y]))
        else:
            assert isinstance(layer, Packed)
            numbers = [ir.AttrInt64(name, value) for name, value in layer.attributes.items()]
            nodes.append(ir.Node("sparsify", layer.op, [x, *own, *shifts], numbers, outputs=[y]))
    opsets = {"": 23, "sparsify": 1, linear_codes.DOMAIN: 1}
    graph = ir.Graph([x], made, nodes=nodes, initializers=weights, opset_imports=opsets, name="layers")
    times = _times(ir.Model(graph, ir_version=10), "x", tokens, in_features)
    return sorted(times)[len(times) // 2] / layers


def _layer(form: Form, out_features: int, in_features: int) -> Layer:
    """A random weight of this size in the form."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator).div(in_features**0.5)
    if form.storage.blocked:
        return dict(zip(linear_codes.TENSORS, linear_codes.pack(weight, form.storage), strict=True))
    if form.pattern is None:
        return {"weight": weight.T.contiguous()}
    chances = torch.rand(weight.shape, generator=generator)
    return packed.pack(weight * keep_mask(chances, form.pattern, "row"), form.pattern, form.storage)


def _stored(name: str, tensor: Tensor) -> ir.Value:
    stored = TorchTensor(tensor, name=name)
    return ir.Value(name=name, const_value=stored, type=ir.TensorType(stored.dtype))


def _another(layer: Layer, tensor: Tensor, number: int) -> Tensor:
    """ONNX Runtime keeps equal dense weights once, so each layer has its rows in an order of its own."""
    return tensor if isinstance(layer, Packed) else tensor.roll(number, 0)


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
    return min(_times(_chain(layer, features, layers), "x0", tokens, features)) / layers


def _times(model: ir.Model, name: str, tokens: int, features: int) -> list[float]:
    """Seconds of every run of a model on random tokens."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {name: np.random.default_rng(0).standard_normal((tokens, features), np.float32)}
    session.run(None, feed)
    times = []
    for _ in range(next(runs for most, runs in RUNS.items() if tokens <= most or most == max(RUNS))):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return times


def _chain(layer: Layer, features: int, layers: int) -> ir.Model:
    """A model of equal layers, one behind the other."""
    float_type = ir.TensorType(ir.DataType.FLOAT)
    x = [ir.Value(name=f"x{i}", type=float_type, shape=ir.Shape(["tokens", features])) for i in range(layers + 1)]
    nodes, initializers = [], []
    for number in range(layers):
        weights = []
        for name, tensor in _tensors(layer).items():
            weights.append(_stored(f"{name}{number}", _another(layer, tensor, number)))
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


def _read(file: Path, key: Mapping[str, str | int]) -> tuple[dict[str, Speed], dict[str, float]]:
    """What the file holds; nothing where there is none, it is damaged, or it is about another machine."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        if content["key"] != key:
            return {}, {}
        speeds = {
            name: Speed(float(s["overhead"]), tuple(map(float, s["empty"])), tuple(map(float, s["full"])))
            for name, s in content["speeds"].items()
        }
        layers = {str(name): float(seconds) for name, seconds in content.get("layers", {}).items()}
        return speeds, {name: seconds for name, seconds in layers.items() if 0 < seconds < math.inf}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, {}


def _write(file: Path, key: Mapping[str, str | int], speeds: Mapping[str, Speed], layers: Mapping[str, float]) -> None:
    """Keep the figures for the next run; where that is not possible, the next run measures again."""
    content = {"key": key, "speeds": {name: asdict(speed) for name, speed in speeds.items()}, "layers": layers}
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
