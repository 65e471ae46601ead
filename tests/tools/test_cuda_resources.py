"""What ptxas says, read into a table, without nvcc."""

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.append(str(TOOLS))  # behind the installed package, as the tools do it
import cuda_resources  # noqa: E402
import gpu_roofline  # noqa: E402

SAID = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4tileIfLi2EEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z4tileIfLi2EEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 162 registers, used 1 barriers, 38912 bytes smem, 424 bytes cmem[0]
ptxas info    : Compile time = 35.680 ms
ptxas info    : Compiling entry function '_Z5plainPf' for 'sm_90'
ptxas info    : Function properties for _Z5plainPf
    8 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 48 registers, used 0 barriers, 8 bytes cumulative stack size, 432 bytes cmem[0]
"""


def test_registers_shared_memory_and_spills_are_read():
    tile, plain = cuda_resources.parse(SAID)
    assert tile == cuda_resources.Usage("_Z4tileIfLi2EEvPT_", 80, 162, 38912, 0)
    assert plain == cuda_resources.Usage("_Z5plainPf", 90, 48, 0, 20)


def test_a_kernel_without_its_registers_is_not_passed_over():
    with pytest.raises(ValueError, match="said nothing about registers"):
        cuda_resources.parse(SAID.replace("Used 48 registers", "Used some"))


def test_a_spill_is_in_the_table():
    page = cuda_resources.table(cuda_resources.parse(SAID), "nvcc 1")
    assert "Spills: 20 bytes in all" in page
    assert "| `tile<float, 2>` | 38912 | 162 | - | - | - | - | - | - | - |" in page
    assert "| `plain` | 0 | - | - | - | - | 48, 20 B spilled | - | - | - |" in page


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void sparsify_cuda::f<__half, (int)2, true>(float*)", "f<half, 2, true>"),
        ("sparsify_cuda::sum_rows(float const*, long)", "sum_rows"),
    ],
)
def test_names_are_short(demangled, name):
    assert cuda_resources.short(demangled) == name


def test_an_nvcc_that_does_not_know_every_architecture_is_refused(tmp_path, monkeypatch, capsys):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cuda_resources, "find_nvcc", lambda: nvcc)
    assert cuda_resources.main([]) == 1
    said = capsys.readouterr().err
    assert said == f"want nvcc 13.0 or newer, which knows sm_110; {nvcc} is release 12.8\n"


def test_no_nvcc_is_said(monkeypatch):
    monkeypatch.setattr(cuda_resources.Path, "is_file", lambda self: False)
    with pytest.raises(FileNotFoundError, match="no nvcc"):
        cuda_resources.find_nvcc()


def test_the_table_in_the_docs_holds_every_kernel_and_no_spill():
    page = (TOOLS.parent / "docs/cuda_resources.md").read_text()
    assert "Spills: 0 bytes in all" in page
    for source in (TOOLS.parent / "cuda").glob("*.cu"):
        kernels = [line.split("(")[0].split()[-1] for line in _lines_after_global(source.read_text())]
        assert kernels, source
        for kernel in kernels:
            assert f"`{kernel}" in page, f"{kernel} of {source.name}: run make cuda"


def _lines_after_global(text):
    """The text behind each ``__global__``, without its launch bounds."""
    for part in text.split("__global__ ")[1:]:
        yield part.removeprefix("void ").split("\n    ", 1)[1] if "__launch_bounds__" in part[:30] else part


def test_the_rooflines_in_the_docs_are_those_of_the_tool():
    assert (TOOLS.parent / "docs/gpu_roofline.md").read_text() == gpu_roofline.page()


def test_a_roofline_by_hand():
    gpu = gpu_roofline.Gpu("slow", bytes_per_s=1e9, fp32=1e9, tensor=1e9, processors=1, shared_kib=100)
    kernel = gpu_roofline.Kernel("k", weight=1.0, activation=2, operations=1, peak=lambda g: g.fp32)
    # 4 x 8 weights of 1 byte, 1 x 8 activations and 1 x 4 outputs of 2 bytes, 4 biases of 4
    assert kernel.bytes(1, 4, 8) == 32 + 16 + 8 + 16
    assert kernel.seconds(gpu, 1, 4, 8) == (pytest.approx(72e-9), True)
    assert kernel.seconds(gpu, 100, 4, 8) == (pytest.approx(3.2e-6), False)
