"""The GPU kernels compiled for the CPU (cuda/emulate), called on torch tensors between sentinels."""

import ctypes
import fcntl
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from sparsify_export.passes.equivalence import compare

ROOT = Path(__file__).parents[1]
FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    f"-I{ROOT / 'cuda/emulate'}", f"-I{ROOT / 'cuda'}", "-x", "c++",
]  # fmt: skip
PAIRS = [
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]
"""Types of activations and weights that belong together."""

HALVES = PAIRS[:2]
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
GUARD = 64
SUCCESS, INVALID_VALUE = 0, 1


def sources():
    """All kernel files, and the tests' own."""
    return [*sorted((ROOT / "cuda").glob("*.cu")), *sorted((ROOT / "tests/cuda").glob("*.cu"))]


def build(files=None, extra=()):
    """Compile kernels with g++ into a shared library, once for each state of the sources; ``extra`` are flags."""
    files = sources() if files is None else files
    digest = hashlib.sha256(" ".join([*map(str, files), *FLAGS, *extra]).encode())
    for path in sorted([*(ROOT / "cuda").rglob("*"), *(ROOT / "tests/cuda").glob("*.[ch]*")]):
        if path.is_file():
            digest.update(path.read_bytes())
    folder = ROOT / "build/emulated" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "kernels.so"
    with (folder / "lock").open("w") as lock:  # pytest -n: one worker compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compiler = os.environ.get("CXX", "c++")

            def compile_one(path):
                out = folder / (path.stem + ".o")
                subprocess.run([compiler, *FLAGS, *extra, "-c", path, "-o", out], check=True)
                return out

            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(compile_one, files))
            subprocess.run([compiler, "-shared", "-o", folder / "part.so", *objects], check=True)
            (folder / "part.so").rename(library)
    return Kernels(ctypes.CDLL(str(library)))


def pointer(tensor):
    """The address of a tensor, or null."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def shifted(tensor, by):
    """A copy that begins ``by`` elements behind a multiple of 64 bytes."""
    memory = torch.empty(tensor.numel() + by + 64, dtype=tensor.dtype)
    begin = -(memory.data_ptr() // tensor.element_size()) % (64 // tensor.element_size()) + by
    memory[begin : begin + tensor.numel()] = tensor.reshape(-1)
    return memory[begin : begin + tensor.numel()].view(tensor.shape)


class Output:
    """A tensor to be written: filled with what no kernel writes, between sentinels."""

    def __init__(self, shape, dtype):
        count = torch.Size(shape).numel()
        self.bytes = torch.full(((count + 2 * GUARD) * dtype.itemsize,), 0xA5, dtype=torch.uint8)
        self.all = self.bytes.view(dtype)
        self.tensor = self.all[GUARD : GUARD + count].view(shape)

    def checked(self):
        """The tensor, after a look at the sentinels."""
        edge = GUARD * self.all.element_size()
        assert (self.bytes[:edge] == 0xA5).all(), "written before the output"
        assert (self.bytes[-edge:] == 0xA5).all(), "written behind the output"
        return self.tensor


class Kernels:
    """The launch functions of cuda/kernels.h, by their names without ``sparsify_``."""

    def __init__(self, library):
        self.library = library

    def call(self, name, *arguments):
        """Call a function; tensors become addresses, ints stay, dtypes become their number."""
        plain = [
            pointer(a)
            if a is None or isinstance(a, torch.Tensor)
            else ctypes.c_int32(TYPES[a])
            if isinstance(a, torch.dtype)
            else ctypes.c_int32(a.value)
            if isinstance(a, ctypes.c_int32)
            else ctypes.c_int64(a)
            for a in arguments
        ]
        return getattr(self.library, "sparsify_" + name)(*plain, ctypes.c_void_p(None))

    def run(self, name, *arguments):
        """Call with the fibers in both orders: whoever forgets a barrier gets two results."""
        outputs = [a for a in arguments if isinstance(a, Output)]
        results = []
        for backwards in (False, True):
            self.library.sparsify_emulate_backwards(backwards)
            for output in outputs:
                output.bytes.fill_(0xA5)
            status = self.call(name, *(a.tensor if isinstance(a, Output) else a for a in arguments))
            assert status == SUCCESS, f"{name} returned {status}"
            results.append([output.checked().clone() for output in outputs])
        for first, second in zip(*results, strict=True):
            width = {1: torch.int8, 2: torch.int16, 4: torch.int32}[first.element_size()]
            assert torch.equal(first.view(width), second.view(width)), f"{name}: the order of the threads matters"
        return results[0][0] if len(outputs) == 1 else results[0]

    def linear(self, name, x, weight, bias, out_features):
        """``x W^T + bias`` by one of the ``spmm`` functions; ``weight`` is its tensors, the values first."""
        y = Output((len(x), out_features), x.dtype)
        sizes = (len(x), out_features, x.shape[1])
        return self.run(name, x.dtype, weight[0].dtype, x, *weight, bias, y, *sizes)


def assert_linear(got, x, dense, bias=None):
    """``got`` is at most twice as wrong as the plain product with float32 sums, rounded to x's dtype."""
    exact = x.double() @ dense.T
    plain = x.float() @ dense.float().T
    if bias is not None:
        exact, plain = exact + bias, plain + bias
    closeness = compare(got, plain.to(got.dtype), exact)
    assert closeness.ok, str(closeness)


def assert_not_finite_where_kept(got, x, kept):
    """``got`` is finite exactly where no infinity or NaN of ``x`` meets a weight that ``kept`` has."""
    met = (~x.isfinite()).double() @ kept.double().T > 0
    assert torch.equal(~got.isfinite(), met)
