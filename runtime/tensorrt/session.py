"""Run a TensorRT engine through the interface of an ONNX Runtime session; buffers are torch tensors on the GPU."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...passes.errors import InputError, NotBuiltError
from ...passes.onnx.plugin import LIBRARY, PLUGINS
from ..session import CausalSession, Floats, Ints, Past
from .profiles import pieces

if TYPE_CHECKING:
    import tensorrt as trt

LOG = logging.getLogger(__name__)
SUFFIXES = (".plan", ".engine")
DEVICE = "cuda"


@dataclass(frozen=True)
class Value:
    """An input or an output, as ONNX Runtime describes them: a size that is not fixed is None."""

    name: str
    shape: tuple[int | None, ...]
    type: str


def is_plan(path: Path) -> bool:
    """Whether a path is called as an engine is."""
    return path.suffix in SUFFIXES


def why_not(*, run: bool) -> str:
    """What is missing here to build an engine, or to ``run`` one; "" for nothing that can be told beforehand."""
    if find_spec("tensorrt") is None:
        return "TensorRT is not installed here"
    try:
        import_module("tensorrt")
    except (ImportError, OSError) as error:  # its libraries, or CUDA's, are missing
        return f"TensorRT cannot be imported here ({error})"
    return "torch sees no NVIDIA GPU here" if run and not torch.cuda.is_available() else ""


def check_can_run(path: Path) -> None:
    """Refuse an engine that does not exist or cannot be run here.

    Raises:
        InputError: there is no such file.
        NotBuiltError: engines cannot be run here.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if why := why_not(run=True):
        raise NotBuiltError(f"{path} cannot be run: {why}; it wants TensorRT 10.15 or newer and an NVIDIA GPU")


class PlanSession:
    """An engine, with one execution context for each of its profiles."""

    def __init__(self, path: Path) -> None:
        """Load an engine.

        Raises:
            InputError: there is no such file, or it is no engine of this TensorRT and GPU, maybe because it needs the
                plugins beside it, which cannot be loaded.
            NotBuiltError: engines cannot be run here.
        """
        check_can_run(path)
        import tensorrt as trt

        from .build_plan import Log, PlanError, load_plugins

        log = Log()
        trt.init_libnvinfer_plugins(log, "")  # TensorRT's own, which some of its operators are
        unloaded = ""
        if (library := path.with_name(LIBRARY)).is_file():
            try:
                load_plugins(library, PLUGINS)
            except PlanError as error:  # an engine may do without them
                unloaded = f"; {error}"
        self._runtime = trt.Runtime(log)  # kept: the engine lives in it
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise InputError(f"{path} is not an engine of this TensorRT and GPU: {' '.join(log.errors)}{unloaded}")
        self._engine: trt.ICudaEngine = engine
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        profiles = range(engine.num_optimization_profiles)
        # One context runs at a time, so all share the memory that the largest needs.
        room = max(1, *(engine.get_device_memory_size_for_profile_v2(index) for index in profiles))
        self._activations = torch.empty(room, dtype=torch.uint8, device=DEVICE)
        self._contexts: list[trt.IExecutionContext] = []
        for index in profiles:
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None or not context.set_optimization_profile_async(index, self._stream.cuda_stream):
                raise InputError(f"{path} cannot be run on this GPU: {' '.join(log.errors)}")
            context.set_device_memory(self._activations.data_ptr(), room)
            self._contexts.append(context)
        for warning in dict.fromkeys(log.warnings):
            LOG.warning("TensorRT: %s", warning)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        dtypes = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64,
            trt.DataType.INT32: torch.int32,
            trt.DataType.BOOL: torch.bool,
        }
        self.dtypes = {name: dtypes[engine.get_tensor_dtype(name)] for name in names}

    def get_inputs(self) -> list[Value]:
        """Names, shapes and types of the inputs."""
        return [self._value(name) for name in self._inputs]

    def get_outputs(self) -> list[Value]:
        """Names, shapes and types of the outputs."""
        return [self._value(name) for name in self._outputs]

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Any]) -> list[Any]:
        """Run on numpy arrays; returns the named outputs, or all, as numpy arrays."""
        results = self.run_on_gpu({name: self.upload(name, array) for name, array in feed.items()})
        return [_host(results[name]) for name in names or self._outputs]

    def upload(self, name: str, array: Any) -> Tensor:
        """An array on the GPU, in the type of the input ``name``."""
        return torch.as_tensor(array).to(DEVICE, self.dtypes[name])

    def run_on_gpu(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on tensors on the GPU; returns when the results are there.

        Raises:
            InputError: the engine was not built for these shapes, or fails.
        """
        if missing := [name for name in self._inputs if name not in feed]:  # the context would use the last one's
            raise InputError(f"the engine wants {', '.join(missing)} too")
        context = self._context({name: tuple(tensor.shape) for name, tensor in feed.items()})
        self._stream.wait_stream(torch.cuda.current_stream())
        held = []
        for name, tensor in feed.items():
            buffer = _room(tensor)
            held.append(buffer)
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, buffer.data_ptr())
        if missing := context.infer_shapes():
            raise InputError(f"the engine cannot tell its shapes without {', '.join(missing)}")
        results = {}
        for name in self._outputs:
            shape = tuple(context.get_tensor_shape(name))
            results[name] = torch.empty(shape, dtype=self.dtypes[name], device=DEVICE)
            buffer = _room(results[name])
            held.append(buffer)
            context.set_tensor_address(name, buffer.data_ptr())
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise InputError("the engine failed")
        self._stream.synchronize()
        return results

    def most(self, name: str) -> list[tuple[int, ...]]:
        """The largest shape of an input in each profile."""
        profiles = range(len(self._contexts))
        return [tuple(self._engine.get_tensor_profile_shape(name, index)[2]) for index in profiles]

    def _context(self, shapes: Mapping[str, tuple[int, ...]]) -> "trt.IExecutionContext":
        """The context of the last profile that takes these shapes; later profiles are narrower."""
        for index in reversed(range(len(self._contexts))):
            ranges = {name: self._engine.get_tensor_profile_shape(name, index) for name in shapes}
            if all(_fits(shape, *ranges[name]) for name, shape in shapes.items()):
                return self._contexts[index]
        told = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:3])
        raise InputError(f"the engine was not built for {told}; give larger --batch, --seq or --context when building")

    def _value(self, name: str) -> Value:
        dtype = str(self.dtypes[name]).removeprefix("torch.").replace("float32", "float")
        shape = tuple(None if size < 0 else size for size in self._engine.get_tensor_shape(name))
        return Value(name, shape, f"tensor({dtype})")


class CausalPlan(CausalSession):
    """A causal language model as an engine; its KV cache stays on the GPU."""

    session: PlanSession

    def random_past(self, batch: int, length: int) -> Past:
        """A cache of ``length`` tokens with normal random numbers, the same at every call."""
        rng = np.random.default_rng(0)
        shapes = [(batch, heads, length, size) for _, heads, _, size in self._shapes]
        arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
        return [self.session.upload(name, array) for name, array in zip(self._past, arrays, strict=True)]

    def step(self, ids: Ints, mask: Ints, past: Past) -> tuple[Floats, Past]:
        """Run some tokens; see ``CausalSession.step``. The logits come to the host, the cache does not."""
        results = self._run(ids, mask, past)
        return _host(results["logits"]), [results[name] for name in self._present]

    def run_only(self, ids: Ints, mask: Ints, past: Past) -> None:
        """Run some tokens and wait, leaving the logits on the GPU."""
        self._run(ids, mask, past)

    def _run(self, ids: Ints, mask: Ints, past: Past) -> dict[str, Tensor]:
        """All tokens, in as many pieces as the engine's profile for prompts wants."""
        tokens = [shape[1] for shape in self.session.most("input_ids")]
        prefill = tokens.index(max(tokens))
        most_past = self.session.most(self._past[0])[prefill][2]
        logits: list[Tensor] = []
        results: dict[str, Tensor] = {}
        begin, cached = 0, mask.shape[1] - ids.shape[1]
        for size in pieces(cached, ids.shape[1], most=tokens[prefill], most_past=most_past):
            end = begin + size
            feed = dict(zip(self._past, past, strict=True))
            for name, array in (("input_ids", ids[:, begin:end]), ("attention_mask", mask[:, : cached + end])):
                feed[name] = self.session.upload(name, array)
            results = self.session.run_on_gpu(feed)
            logits.append(results["logits"])
            past, begin = [results[name] for name in self._present], end
        return {**results, "logits": logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)}


def _fits(shape: tuple[int, ...], least: Sequence[int], _: Sequence[int], most: Sequence[int]) -> bool:
    return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))


def _room(tensor: Tensor) -> Tensor:
    """The tensor as it lies in memory; where it is empty, one byte: TensorRT wants an address that is not null."""
    return tensor.contiguous() if tensor.numel() else torch.empty(1, dtype=torch.uint8, device=DEVICE)


def _host(tensor: Tensor) -> Any:
    """On the host, as numpy knows it: 16-bit floats as float32."""
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
