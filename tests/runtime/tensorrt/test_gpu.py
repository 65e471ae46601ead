"""A real engine on a real GPU: it is built, it says what ONNX Runtime says, and the report knows its tactics."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from sparsify_export import __file__ as package
from sparsify_export.cli import main
from sparsify_export.passes.onnx.plugin import LIBRARY
from sparsify_export.runtime.artifact import causal, open_artifact
from sparsify_export.runtime.evaluate import onnx_logits
from sparsify_export.runtime.generate import generate
from sparsify_export.runtime.session import CausalSession, open_session
from sparsify_export.runtime.tensorrt.twin import write_twin
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("tensorrt") is None, reason="TensorRT is not installed here"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama large enough for sparse tactics."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1024, max_position_embeddings=256)).save_pretrained(folder)
    return folder


def built(folder, out, *how):
    arguments = [str(folder), *how, "--effort", "fast", "--samples", "4", "--seq-len", "32"]
    assert main([*arguments, "--batch", "1,1,2", "--quiet", "-o", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def engine(folder, tmp_path_factory):
    """Its engine, 2:4."""
    return built(folder, tmp_path_factory.mktemp("engine") / "model.plan", "--nm", "2:4")


def logits_of(engine, onnx_file, ids):
    """What the engine says, and what a file does in ONNX Runtime."""
    onnx = CausalSession(open_session(onnx_file))
    return onnx_logits(causal(open_artifact(engine)))(ids).float(), onnx_logits(onnx)(ids).float()


IDS = torch.randint(0, 1024, (1, 48), generator=torch.Generator().manual_seed(0))


def test_the_engine_has_the_logits_and_the_text_of_the_onnx_file(engine):
    plan = causal(open_artifact(engine))
    onnx = CausalSession(open_session(engine.with_name("model.trt.onnx")))
    wanted = onnx_logits(onnx)(IDS).float()
    assert (onnx_logits(plan)(IDS) - wanted).abs().max() <= 0.02 * wanted.abs().max()
    prompt = [IDS[0, :8].tolist()]
    assert generate(plan, prompt, max_new_tokens=8).tokens == generate(onnx, prompt, max_new_tokens=8).tokens


def test_the_report_says_of_every_linear_whether_its_tactic_is_sparse(engine):
    report = json.loads(engine.with_name("model.plan.report.json").read_text())
    linears = report["engine"]["linears"]
    assert {linear["picked"] for linear in linears} <= {"yes", "no", "unknown"}
    assert report["engine"]["dense_plan_bytes"] > 0
    assert {row["name"] for row in report["latency"]} == {"prefill 128", "decode 64"}


def test_bench_eval_and_generate_run_the_engine(engine, capsys):
    dense = engine.with_name("model.dense.plan")
    assert main(["bench", str(engine), "--against", str(dense), "--repeats", "3", "--json"]) == 0
    assert "decode 64" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_an_engine_of_8_bit_codes_has_the_logits_of_the_onnx_file(folder, tmp_path, dtype):
    """A code that falls to the other side is one step of an activation, so more may differ than in fp16."""
    if dtype == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 products need an NVIDIA GPU of compute capability 8.9")
    plan = built(folder, tmp_path / "model.plan", "--nm", "2:4", "--dtype", dtype)
    got, wanted = logits_of(plan, tmp_path / "model.trt.onnx", IDS)
    assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max()
    report = json.loads((tmp_path / "model.plan.report.json").read_text())
    coded = [linear for linear in report["engine"]["linears"] if linear["bits"] == 8]
    assert len(coded) == 8
    assert {linear["picked"] for linear in coded} <= {"yes", "no", "unknown"}


@pytest.mark.skipif(not Path(package).with_name(LIBRARY).is_file(), reason="the plugins were not built (docs/gpu.md)")
def test_an_engine_with_plugins_is_built_and_runs(folder, tmp_path):
    plan = built(folder, tmp_path / "model.plan", "--sparsity", "0.5")
    twin = tmp_path / "twin.onnx"
    write_twin(tmp_path / "model.trt.onnx", twin)
    got, wanted = logits_of(plan, twin, IDS)
    assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max()
    # The script that stands alone takes the library from where it is told.
    script = tmp_path / "build_plan.py"
    plan.unlink()
    (tmp_path / LIBRARY).rename(tmp_path / "elsewhere.so")
    arguments = [str(tmp_path / "model.trt.json"), "--plugins", str(tmp_path / "elsewhere.so")]
    subprocess.run([sys.executable, str(script), *arguments], check=True)
    assert plan.is_file()
