"""A real engine on a real GPU: it is built, it says what ONNX Runtime says, and the report knows its tactics."""

import json
from importlib.util import find_spec

import pytest
import torch
from sparsify_export.cli import main
from sparsify_export.runtime.artifact import causal, open_artifact
from sparsify_export.runtime.evaluate import onnx_logits
from sparsify_export.runtime.generate import generate
from sparsify_export.runtime.session import CausalSession, open_session
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("tensorrt") is None, reason="TensorRT is not installed here"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A random Llama large enough for sparse tactics, 2:4, as an engine."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1024, max_position_embeddings=256)).save_pretrained(folder)
    out = folder.parent / "engine" / "model.plan"
    out.parent.mkdir()
    arguments = [str(folder), "--nm", "2:4", "--effort", "fast", "--samples", "4", "--seq-len", "32"]
    assert main([*arguments, "--batch", "1,1,2", "--quiet", "-o", str(out)]) == 0
    return out


def test_the_engine_has_the_logits_and_the_text_of_the_onnx_file(engine):
    plan = causal(open_artifact(engine))
    onnx = CausalSession(open_session(engine.with_name("model.trt.onnx")))
    ids = torch.randint(0, 1024, (1, 48), generator=torch.Generator().manual_seed(0))
    wanted = onnx_logits(onnx)(ids).float()
    assert (onnx_logits(plan)(ids) - wanted).abs().max() <= 0.02 * wanted.abs().max()
    prompt = [ids[0, :8].tolist()]
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
