"""The ONNX file for TensorRT of a real model: SmolLM2-135M, 2:4 in fp16. Run by `make slow`."""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from sparsify_export.calibrate.patterns import NM
from sparsify_export.cli import main
from sparsify_export.passes.frontend.load import load
from sparsify_export.passes.onnx.tensorrt import DOCUMENTED
from sparsify_export.runtime.generate import generate, greedy_torch
from sparsify_export.runtime.inspection import check_pattern, weights
from sparsify_export.runtime.published import put_weights
from sparsify_export.runtime.session import CausalSession, open_session

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source():
    finder = Path(__file__).parent.parent / "tools" / "smollm2.py"
    return subprocess.run([sys.executable, finder], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def file(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("engine") / "model.plan"
    few = ["--effort", "fast", "--samples", "8", "--seq-len", "128"]
    assert main([source, "--nm", "2:4", *few, "--quiet", "-o", str(out)]) == 3
    return out.with_name("model.trt.onnx")


def test_only_documented_ops_and_every_pruned_weight_2_of_4_along_k(file):
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(str(file), load_external_data=False)
    assert {(node.domain, node.op_type) for node in model.graph.node} <= {("", name) for name in DOCUMENTED}
    count = check_pattern(file, NM(2, 4))
    assert (count.weights, count.groups) == (120, 106_168_320 // 4)
    options = json.loads(file.with_name("model.trt.json").read_text())
    sparse = [linear for linear in options["linears"] if linear["pattern"] == "2:4"]
    assert {(linear["k"], linear["n"]) for linear in sparse} == {(576, 960), (576, 576), (576, 3072), (1536, 576)}
    assert {linear["eligible"] for linear in sparse} == {"yes"}


def test_onnx_runtime_writes_the_32_tokens_of_torch(source, file):
    pretrained = load(source)
    state, params = pretrained.model.state_dict(), {}
    for info, weight in weights(file):
        assert not bool(((weight == 0) & weight.signbit()).any()), info.path
        if info.path != "lm_head":
            module, _, names = info.path.rpartition(".")
            paths = [f"{module}.{name}" for name in names.split("+")]
            rows = [len(state[f"{path}.weight"]) for path in paths]
            params.update(zip((f"model.{path}.weight" for path in paths), weight.float().split(rows), strict=True))
    put_weights(pretrained.model, params, {})
    for parameter in pretrained.model.parameters():
        parameter.data = parameter.data.half()
    ids = pretrained.tokenizer("The history of the steam engine begins")["input_ids"]
    got = generate(CausalSession(open_session(file)), [ids], max_new_tokens=32).tokens
    assert got == greedy_torch(pretrained.model, [ids], max_new_tokens=32)
