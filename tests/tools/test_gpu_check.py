"""tools/gpu_check.py without a GPU: its sentence, its report, and its arithmetic on the emulated kernels."""

import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_bindings
import cuda_emulated
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "tools"))  # behind the installed package, as the tools do it
import gpu_check


@pytest.fixture(scope="module")
def cuda():
    return cuda_bindings.build(cuda_emulated.build())


def test_every_kernel_is_checked_and_right(cuda):
    checks = list(gpu_check.numerics(cuda, "cpu", [(9, 7, 64), (2, 5, 132)]))
    assert [c for c in checks if not c.ok] == []
    tested = {c.kernel.split(",")[0] for c in checks}
    assert {f"{name} {v}" for name in ("spmm_24", "spmm_bitmask") for v in ("readable", "decode", "prefill")} <= tested
    assert {"spmm_24 few", "spmm_24_int4 decode", "quantise_tokens", "gather_channels", "rate_mask_forward"} <= tested
    assert {"rate_mask_backward"} <= tested


def test_a_wrong_kernel_is_seen(cuda):
    def off(x, index, y, stream):
        cuda.gather_channels(x, index, y, stream)
        y[0, 3] += 1

    (gather, *_) = gpu_check.others(SimpleNamespace(**{**vars(cuda), "gather_channels": off}), "cpu", 2, 8)
    assert not gather.ok
    page = gpu_check.page(["some GPU"], [gather], [], [])
    assert "0 of 1 results are as close to float64" in page
    assert "| gather_channels | 2 x 8 | 1.00e+00 | 0.00e+00 | WRONG |" in page


def test_the_page_compares_with_dense():
    rows = [
        gpu_check.Row(4096, 4096, 1, {"dense": 20.0, "24 decode": 10.0, "cuSPARSELt": None}),
        gpu_check.Row(4096, 4096, 2048, {"dense": 200.0, "24 prefill": 125.0}),
    ]
    page = gpu_check.page(["some GPU"], [], rows, ["cuSPARSELt: not in this torch"])
    assert "| N x K | M | dense | 24 decode | cuSPARSELt | 24 prefill |" in page
    assert "| 4096 x 4096 | 1 | 20.0 (1.00) | 10.0 (2.00) | - | - |" in page
    assert "| 4096 x 4096 | 2048 | 200.0 (1.00) | - | - | 125.0 (1.60) |" in page
    assert "Not measured: cuSPARSELt: not in this torch." in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("arguments", [[], ["--find"]])
def test_without_a_gpu_it_says_so_in_one_sentence(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert gpu_check.main(arguments) == 3
    said = capsys.readouterr().err
    assert said.startswith("There is no NVIDIA GPU that torch")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
