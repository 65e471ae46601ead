"""``doctor``: what works is said to work, and what does not is named with what mends it."""

import onnxruntime
import pytest
from sparsify_export import doctor
from sparsify_export.cli import main
from sparsify_export.doctor import examine


def found():
    """The checks by their name."""
    return {check.what: check for check in examine()}


def test_what_the_suite_runs_with_works(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for check in examine():
        assert check.what in said
        assert check.works or not check.needed
        assert check.found


def test_what_is_missing_is_named_with_a_command(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "why_not", lambda *, run: "TensorRT is not installed here")
    checks = found()
    assert checks["onnxruntime-genai"].mend == "pip install onnxruntime-genai"
    assert checks["TensorRT"].mend == "pip install 'tensorrt-cu13>=10.15,<12'"
    assert "SPARSIFY_CUDA=ON" in checks["GPU kernels"].mend
    assert not any(checks[name].works for name in ("onnxruntime-genai", "TensorRT", "GPU kernels"))


@pytest.mark.parametrize("version", ["1.24.1", "1.9.0"])
def test_an_old_onnx_runtime_is_refused(version, monkeypatch, capsys):
    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert main(["doctor"]) == 2
    assert f"ONNX Runtime: {version}, wanted 1.31 or newer; mend it with: pip install" in capsys.readouterr().err


def test_a_library_that_cannot_be_loaded_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(doctor, "library_path", lambda: tmp_path / "broken.so")
    assert main(["doctor"]) == 2
    assert "our op library: " in capsys.readouterr().err


def test_kernels_that_were_chosen_are_said_to_be(monkeypatch):
    monkeypatch.setenv("SPARSIFY_ISA", "avx2")
    monkeypatch.setattr(doctor._native, "isa", lambda: "avx2")
    check = found()["kernels"]
    assert check.found.startswith("avx2, as SPARSIFY_ISA says: AVX2: fp32 gains")
    assert check.mend == "unset SPARSIFY_ISA"
