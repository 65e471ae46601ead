"""Layers made ready to run: a contestant is called, runs all its layers once, and returns the seconds of one layer."""

import contextlib
import copy
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import sparsify_export
from kernel_bench.layers import Layer
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

LIBRARY = str(Path(sparsify_export.__file__).with_name("libsparsify_ort.so"))
WORKER = str(Path(__file__).with_name("deepsparse_worker.py"))
Contestant = Callable[[], float]


@dataclass(frozen=True)
class Work:
    """What a contestant is made for; ``megabytes`` of weights are cycled through."""

    tokens: int
    rows: int
    cols: int
    threads: int
    megabytes: float

    def layers(self, nbytes: int) -> int:
        """How many layers of ``nbytes`` each a contestant runs in turn.

        Up to 16 tokens reading weights is what takes the time: so many that no cache holds them until their next turn.
        With more, only enough layers for 2 GFLOP of dense work, so that waking the threads does not count.
        """
        count = math.ceil(self.megabytes * 1e6 / nbytes)
        return count if self.tokens <= 16 else min(count, math.ceil(1e9 / (self.rows * self.cols * self.tokens)))


def write_model(folder: str, layer: Layer, count: int, work: Work, *, shift: bool) -> str:
    """Write ``count`` copies of a layer, each with its own input, output and bytes; return the model's path.

    Args:
        folder: where model.onnx and its weights go.
        layer: what is copied.
        count: how often.
        work: for the sizes of x and y.
        shift: also rotate the last axis of each copy's weights, so that no two copies are equal.
    """
    nodes, weights, inputs, outputs = [], [], [], []
    with (Path(folder) / "weights").open("wb") as file:
        for number in range(count):
            inputs.append(helper.make_tensor_value_info(f"x_{number}", TensorProto.FLOAT, [work.tokens, work.cols]))
            outputs.append(helper.make_tensor_value_info(f"y_{number}", TensorProto.FLOAT, [work.tokens, work.rows]))
            for node in map(copy.deepcopy, layer.nodes):
                node.input[:] = [f"{name}_{number}" for name in node.input]
                node.output[:] = [f"{name}_{number}" for name in node.output]
                nodes.append(node)
            for tensor in layer.tensors:
                proto = onnx.TensorProto(name=f"{tensor.name}_{number}", data_type=tensor.kind, dims=tensor.array.shape)
                proto.raw_data = b""  # set_external_data wants it to be there
                file.seek(-file.tell() % 4096, os.SEEK_CUR)
                set_external_data(proto, "weights", file.tell(), tensor.array.nbytes)
                proto.ClearField("raw_data")
                file.write(np.roll(tensor.array, number, -1) if shift else tensor.array)
                weights.append(proto)
    opsets = [helper.make_opsetid(*pair) for pair in (("", 13), ("com.microsoft", 1), ("sparsify", 1))]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
    path = str(Path(folder) / "model.onnx")
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=7), path)
    return path


class OnnxRuntime:
    """A layer in ONNX Runtime.

    Every copy has its own input name, or ONNX Runtime would quantise a shared x once for all. Inputs and outputs are
    bound to memory that stays, as a model's inner tensors do. Threads stop spinning when a run ends: the next run is
    another contestant's.

    Attributes:
        x: what all copies read, float32 [M, K].
    """

    def __init__(self, layer: Layer, work: Work):
        self._count = work.layers(layer.nbytes)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = work.threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.register_custom_ops_library(LIBRARY)
        with tempfile.TemporaryDirectory() as folder:  # a mapped file lives on until it is unmapped
            path = write_model(folder, layer, self._count, work, shift=False)
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.x = np.random.default_rng(1).standard_normal((work.tokens, work.cols), np.float32)
        x_value = onnxruntime.OrtValue.ortvalue_from_numpy(self.x)
        self._y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((work.tokens, work.rows), np.float32))
        self._binding = self._session.io_binding()
        for number in range(self._count):
            self._binding.bind_ortvalue_input(f"x_{number}", x_value)
            self._binding.bind_ortvalue_output(f"y_{number}", self._y)
        self._clock = clock_for(work.threads)

    def __call__(self) -> float:
        """Run all layers once; the seconds of one."""
        start = self._clock()
        self._session.run_with_iobinding(self._binding)
        return (self._clock() - start) / self._count

    @property
    def y(self) -> np.ndarray:
        """What the last run wrote, float32 [M, N]."""
        return self._y.numpy()


def clock_for(threads: int) -> Callable[[], float]:
    """Wall time, or for one thread its processor time."""
    return time.thread_time if threads == 1 else time.perf_counter


class DeepSparse:
    """One model in a DeepSparse process of its own; it works only while it is asked for a run."""

    def __init__(self, python: str, layer: Layer, density: float, work: Work):
        # It stores kept weights only, in a layout of its own: count them as values and one bit a weight.
        self.count = work.layers(math.ceil(work.rows * work.cols * (4 * density + 1 / 8)))
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (close() does)
        with tempfile.TemporaryDirectory() as folder:
            path = write_model(folder, layer, self.count, work, shift=True)
            # Its own choice of threads, no messages home.
            env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
            self.process = subprocess.Popen(
                [python, WORKER, path, str(work.tokens), str(work.threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
                env={**env, "NM_DISABLE_ANALYTICS": "1"},
            )
            self._answer()

    def __call__(self) -> float:
        """Run all layers once; the seconds of one."""
        with contextlib.suppress(BrokenPipeError):  # if it is dead, _answer says why
            self.process.stdin.write("{}\n")
            self.process.stdin.flush()
        return self._answer()["seconds"] / self.count

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the DeepSparse process ended with {self.process.wait()}:\n{self.log.read()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()
