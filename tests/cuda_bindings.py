"""cuda/bindings.cpp compiled against the emulated kernels: `_cuda` for the CPU's memory."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path

import nanobind
from cuda_emulated import FLAGS, ROOT


def build(kernels):
    """Compile cuda/bindings.cpp against the emulated kernels, beside them and once."""
    folder = Path(kernels.library._name).parent
    module = folder / "_cuda.so"
    if not module.exists():
        source = Path(nanobind.source_dir())
        include = ["-isystem", nanobind.include_dir(), "-isystem", sysconfig.get_path("include")]
        compiler = os.environ.get("CXX", "c++")
        common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-O0", *include]
        part = {name: folder / f"part-{os.getpid()}-{name}" for name in ("nanobind.o", "bindings.o", "_cuda.so")}
        every = source / "nb_combined.cpp"
        robin = ["-isystem", source.parent / "ext/robin_map/include", "-fno-strict-aliasing", "-w"]
        subprocess.run([compiler, *common, *robin, "-c", every, "-o", part["nanobind.o"]], check=True)
        flags = [flag for flag in FLAGS if flag not in ("-O1", "-x", "c++")]
        mine = [*flags, *common, "-DSPARSIFY_EMULATED", "-c", ROOT / "cuda/bindings.cpp", "-o", part["bindings.o"]]
        subprocess.run([compiler, *mine], check=True)
        objects = [part["nanobind.o"], part["bindings.o"], kernels.library._name]
        subprocess.run([compiler, "-shared", *objects, "-o", part["_cuda.so"]], check=True)
        part["_cuda.so"].rename(module)
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(module))
    spec = importlib.util.spec_from_file_location("_cuda", module, loader=loader)
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded
