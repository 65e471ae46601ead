"""The other tests of this folder again, with every instruction set that this machine has but does not prefer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sparsify_export import _native

ALL = [
    "amx",
    "avx512bf16",
    "avx512vnni",
    "avx512",
    "avx2",
    "portable",
]  # fastest first: a machine that has one has those behind it
FILES = ["test_linear.py", "test_quantised.py", "test_pairwise_max_sum.py"]


def _run(isa, *command):
    environment = {**os.environ, "SPARSIFY_ISA": isa}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif("SPARSIFY_ISA" in os.environ, reason="already chosen")
@pytest.mark.parametrize(
    "isa", [isa if isa == "portable" else pytest.param(isa, marks=pytest.mark.slow) for isa in ALL[1:]]
)
def test_every_slower_instruction_set(isa):
    if ALL.index(isa) <= ALL.index(_native.isa()):
        pytest.skip(f"this machine prefers {_native.isa()}")
    here = Path(__file__).parent
    files = [str(here / name) for name in FILES]
    done = _run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not many_blocks", *files)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif("SPARSIFY_ISA" in os.environ, reason="already chosen")
def test_the_model_of_the_tiles():
    """The AMX kernels on any machine with AVX-512 BF16: what runs on tiles there runs on tiles_model.h here."""
    if ALL.index(_native.isa()) > ALL.index("avx512bf16"):
        pytest.skip(f"this machine has {_native.isa()}; the kernels around the tiles need AVX-512 BF16")
    here = Path(__file__).parent
    files = [str(here / name) for name in FILES[:2]]
    done = _run("amx-model", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not many_blocks", *files)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_variable_is_obeyed():
    done = _run("portable", "-c", "from sparsify_export import _native; print(_native.isa())")
    assert done.stdout.strip() == "portable", done.stderr


def test_an_instruction_set_that_is_not_there_is_an_error():
    done = _run("amx3", "-c", "from sparsify_export import _native; _native.isa()")
    assert (
        "SPARSIFY_ISA must be amx, avx512bf16, avx512vnni, avx512, avx2, portable or amx-model, and one that this "
        "machine has" in done.stderr
    )


@pytest.mark.parametrize(("dtype", "columns"), [("bf16", 32), ("int8", 64)])
def test_the_burst_of_tiles_counts_its_operations(dtype, columns):
    has_tiles = _native.isa().startswith("amx")
    assert _native.tile_burst(3, dtype) == (64 * 3 * 4 * 2 * 16 * 16 * columns if has_tiles else 0)
    with pytest.raises(ValueError, match="dtype must be bf16 or int8, got fp32"):
        _native.tile_burst(1, "fp32")
