"""``sparsify-export doctor``: what works on this machine, and the command that mends what does not."""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import onnxruntime as ort  # type: ignore[import-untyped]
import torch
from rich.markup import escape
from rich.table import Table

from . import _native
from .passes.onnx.plugin import LIBRARY
from .runtime import library_path
from .runtime.machine import this_machine
from .runtime.tensorrt.session import why_not

BEST = {
    "portable": "no SIMD kernels: everything is slower than dense",
    "avx2": "AVX2: fp32 gains at few tokens, int4 loses everywhere",
}
"""What the processors without AVX-512 give; see docs/kernels.md."""
FORCED = "SPARSIFY_ISA"
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
"""What the kernels use, as Linux calls it."""
AGAIN = "pip install . --force-reinstall --no-deps --no-build-isolation   # in the project's folder"
CUDA_BUILD = "pip install . --no-build-isolation -Ccmake.define.SPARSIFY_CUDA=ON   # docs/gpu.md"


@dataclass(frozen=True)
class Check:
    """Something that may work here.

    Attributes:
        what: its name.
        works: whether it does.
        found: what was found, or what is missing.
        mend: a command, or what to do, where it does not work; "" where nothing helps or has to.
        needed: whether compiling to ONNX and running that needs it.
    """

    what: str
    works: bool
    found: str
    mend: str = ""
    needed: bool = False


def examine() -> tuple[Check, ...]:
    """Look at everything; nothing is installed, downloaded or changed."""
    checks: tuple[Callable[[], Check], ...] = (
        _processor,
        _kernels,
        _onnxruntime,
        _library,
        _torch,
        _genai,
        _tensorrt,
        _plugins,
        _gpu,
        _gpu_kernels,
    )
    return tuple(check() for check in checks)


def render(checks: tuple[Check, ...]) -> Table:
    """A line a check."""
    table = Table("what", "works", "found", "what mends it", title="sparsify-export doctor", title_justify="left")
    for column in table.columns:  # a path or a command cut short cannot be copied
        column.overflow = "fold"
    for check in checks:
        table.add_row(check.what, "yes" if check.works else "no", escape(check.found), escape(check.mend))
    return table


def _processor() -> Check:
    name, machine, info = this_machine().key["processor"], platform.machine(), Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8").split()) if info.is_file() else set()
    has = " ".join(feature for feature in FEATURES if feature in flags) or "no feature that is known here"
    found = f"{name}, {os.cpu_count()} logical cores, {machine}: {has}"
    return Check("processor", machine in ("x86_64", "AMD64"), found)


def _kernels() -> Check:
    isa = _native.isa()
    forced = os.environ.get(FORCED)
    said = f"{isa}, as {FORCED} says" if forced else isa
    mend = f"unset {FORCED}" if forced else ""
    return Check("kernels", isa != "portable", f"{said}{': ' + BEST[isa] if isa in BEST else ''}", mend)


def _onnxruntime() -> Check:
    version, wanted = ort.__version__, _least("onnxruntime")
    works = _numbers(version) >= _numbers(wanted)
    mend = "" if works else f"pip install 'onnxruntime>={wanted}'"
    return Check("ONNX Runtime", works, f"{version}, wanted {wanted} or newer", mend, needed=True)


def _library() -> Check:
    """Whether ONNX Runtime takes our ops: registered in options of a session, as a program does it."""
    try:
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library_path()))
    except Exception as error:  # what ONNX Runtime raises has no public base class
        return Check("our op library", False, str(error).splitlines()[0], AGAIN, needed=True)
    return Check("our op library", True, str(library_path()), needed=True)


def _torch() -> Check:
    found = f"torch {torch.__version__}, transformers {importlib.metadata.version('transformers')}"
    return Check("compiling", True, f"{found}, {torch.get_num_threads()} threads", needed=True)


def _genai() -> Check:
    return _installed(
        "onnxruntime_genai", "onnxruntime-genai", "runs folders of decoders, genai_config.json is in them"
    )


def _tensorrt() -> Check:
    why = why_not(run=False)
    if why:
        return Check("TensorRT", False, why, "pip install 'tensorrt-cu13>=10.15,<12'")
    return Check("TensorRT", True, f"{importlib.metadata.version('tensorrt')}: engines can be built")


def _plugins() -> Check:
    file = Path(__file__).with_name(LIBRARY)
    return Check("TensorRT plugins", file.is_file(), str(file), "" if file.is_file() else CUDA_BUILD)


def _gpu() -> Check:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("NVIDIA GPU", True, ", ".join(names))
    if torch.version.cuda is None:
        return Check("NVIDIA GPU", False, "this torch was built without CUDA", "install torch's CUDA build")
    return Check("NVIDIA GPU", False, "torch sees none", "nvidia-smi   # says whether there is one and its driver")


def _gpu_kernels() -> Check:
    built = find_spec(f"{__package__}._cuda") is not None
    found = "built" if built else "this installation was built without them"
    return Check("GPU kernels", built, found, "" if built else CUDA_BUILD)


def _installed(module: str, package: str, what: str) -> Check:
    if find_spec(module) is None:
        return Check(package, False, "is not installed here", f"pip install {package}")
    return Check(package, True, f"{importlib.metadata.version(package)}: {what}")


def _least(package: str) -> str:
    """The oldest version of a package that this installation takes, as its own metadata says."""
    for line in importlib.metadata.requires("sparsify-export") or ():
        if line.startswith(f"{package}>="):
            return line.removeprefix(f"{package}>=").split(";")[0].split(",")[0].strip()
    raise ValueError(f"the metadata of sparsify-export does not name {package}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
