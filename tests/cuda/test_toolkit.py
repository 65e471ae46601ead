"""Which CUDA toolkits the build takes, and for which GPUs it compiles by default."""

import subprocess
import sysconfig
from pathlib import Path

import pytest
from cuda_emulated import ROOT

CMAKE = Path(sysconfig.get_path("scripts"), "cmake")


def cmake(*arguments):
    return subprocess.run([CMAKE, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def choice(tmp_path):
    """What toolkit.cmake makes of a version."""

    def run(version):
        script = tmp_path / "ask.cmake"
        script.write_text(
            f"set(SPARSIFY_TOOLKIT {version})\ninclude({ROOT}/cuda/toolkit.cmake)\n"
            'message("${SPARSIFY_TOO_OLD}|${SPARSIFY_ARCHITECTURES}")\n'
        )
        return cmake("-P", script).stderr.strip().split("|")

    return run


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("12.5", "80-real;86-real;87-real;89-real;90"),
        ("12.8", "80-real;86-real;87-real;89-real;90-real;100-real;120"),
        ("12.10", "80-real;86-real;87-real;89-real;90-real;100-real;120"),
        ("13.0", "80-real;86-real;87-real;89-real;90-real;100-real;110-real;120"),
    ],
)
def test_every_gpu_with_sparse_tensor_cores_that_the_toolkit_knows(choice, version, wanted):
    assert choice(version) == ["", wanted]


def test_a_toolkit_without_the_instruction_is_refused_in_one_sentence(choice, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    said = "the GPU kernels want CUDA 12.5 or newer (mma.sp::ordered_metadata), got 12.4"
    assert choice("12.4") == [said, ""]
    options = ("-DSPARSIFY_PYTHON=OFF", "-DSPARSIFY_CUDA=ON", f"-DSPARSIFY_NVCC={nvcc}")
    done = cmake(
        "-S",
        ROOT,
        "-B",
        tmp_path / "build",
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={CMAKE.with_name('ninja')}",
        *options,
    )
    assert done.returncode != 0
    assert said in " ".join(done.stderr.split())
