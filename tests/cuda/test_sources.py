"""What kernel files may include, and that each is built and declared."""

import re

import pytest
from cuda_emulated import ROOT

OURS = {"kernels.h", "choose.cuh", "launch.cuh", "load.cuh", "number.cuh", "ptx.cuh", "tile_24.cuh"}
CUDA = {"cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"}
STANDARD = {"cstdint", "type_traits"}
FILES = sorted([*(ROOT / "cuda").glob("*.cu"), *(ROOT / "cuda").glob("*.cuh"), ROOT / "cuda/kernels.h"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_kernel_file_knows_nothing_but_cuda(path):
    included = set(re.findall(r'#include ["<](.+)[">]', path.read_text()))
    assert included <= OURS | CUDA | STANDARD


def test_every_kernel_file_is_built():
    listed = set(re.findall(r"\w+\.cu\b", (ROOT / "cuda/CMakeLists.txt").read_text()))
    assert listed == {path.name for path in FILES if path.suffix == ".cu"}


def test_every_launch_function_is_declared_and_defined_once():
    declared = re.findall(r"^cudaError_t (sparsify_\w+)\(", (ROOT / "cuda/kernels.h").read_text(), re.MULTILINE)
    defined = [
        name
        for path in FILES
        if path.suffix == ".cu"
        for name in re.findall(r'^extern "C" cudaError_t (sparsify_\w+)\(', path.read_text(), re.MULTILINE)
    ]
    assert sorted(declared) == sorted(defined)
