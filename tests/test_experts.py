"""Models with experts through the whole command: verified against the published forward, in every storage."""

import json

import numpy as np
import pytest
from expert_models import MODELS, random_experts
from sparsify_export.cli import main
from sparsify_export.passes.dialect import experts
from sparsify_export.runtime import published
from sparsify_export.runtime.inspection import inspect, weights
from sparsify_export.runtime.session import CausalSession, open_session, sparse_runs

QUICK = [("mixtral", "--nm 2:4"), ("gpt_oss", "--sparsity 0.6 --effort fast --dtype int8")]
SLOW = [
    *((name, "--nm 2:4") for name in MODELS if name != "mixtral"),
    ("mixtral", "--nm 2:4 --dtype bf16"),
    ("mixtral", "--nm 2:4 --dtype int8"),
    ("mixtral", "--nm 2:4 --dtype int4 --group 32"),
    ("mixtral", "--sparsity 0.5 --effort fast --dtype int4 --group 32"),
    ("mixtral", "--nm 2:4 --effort best"),
    ("mixtral", "--sparsity 0.5"),
]


def written(name, folder):
    random_experts(name).save_pretrained(folder / "model")
    return str(folder / "model")


def compiled(name, flags, folder):
    """The report of a compilation that went well, and the file."""
    out = folder / "out.onnx"
    assert main([written(name, folder), "-o", str(out), *flags.split(), "--seed", "1"]) == 0
    return json.loads((folder / "out.onnx.report.json").read_text(encoding="utf-8")), out


@pytest.mark.parametrize(
    ("name", "flags"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)], ids=str
)
def test_the_command_prunes_the_experts_and_the_file_is_the_published_model(name, flags, tmp_path):
    """``main`` compares the file with the model's own forward and generation, with our kernels and without."""
    report, out = compiled(name, flags, tmp_path)
    inside = [x for x in report["linears"] if ".layers." in x["path"]]
    pruned = [x for x in inside if x["op"] != "MatMul"]
    sizes = [sum(x["shape"][0] * x["shape"][1] for x in some) for some in (pruned, inside)]
    assert sizes[0] / sizes[1] >= 0.95
    assert {x["reason"] for x in inside if x["op"] == "MatMul"} == {"it chooses the experts"}
    found = [x for x in inside if ".experts." in x["path"]]
    assert found
    assert all(x["op"].startswith(experts.PREFIX) for x in found)
    ways = {"kernels", "kernels, decoding", "functions", "functions, decoding"}
    assert {verified["how"] for verified in report["verified"]} == ways
    told = {x.path: x for x in inspect(out)}
    stacked = [x for path, x in told.items() if path.endswith(("gate_up_proj", "down_proj")) and ".experts." in path]
    assert sum(x.shape[0] for x in stacked) == sum(x["shape"][0] for x in found)


def test_ours_runs_the_experts_and_decodes(tmp_path):
    _, out = compiled("qwen3_moe", "--nm 2:4 --effort fast", tmp_path)
    session = open_session(out, profile=tmp_path / "profile")
    steps = CausalSession(session)
    steps.step(np.array([[5, 6, 7]]), np.ones((1, 3), np.int64), steps.empty_past(1))
    assert sparse_runs(session)["experts_linear_nm"] == 4
    assert len([x for x, _ in weights(out) if x.op == "experts_linear_nm"]) == 4


def test_an_expert_in_anothers_place_is_seen(tmp_path, monkeypatch, capsys):
    """The fault that everything above must be able to see."""
    restacked = published.restacked

    def turned(*arguments):
        value = restacked(*arguments)
        return None if value is None else value.roll(1, 0)

    monkeypatch.setattr(published, "restacked", turned)
    source, out = written("mixtral", tmp_path), str(tmp_path / "out.onnx")
    assert main([source, "-o", out, "--nm", "2:4", "--effort", "fast"]) == 4
    assert "differs from the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("-o out.plan --nm 2:4", "this model has experts, which TensorRT's parser has no op for"),
        ("-o out.onnx --nm 2:4 --bytes 0.8", "this model has experts, and what one of them takes"),
        ("-o out.onnx --nm 2:4 --alternatives", "this model has experts, of which --alternatives knows no other form"),
    ],
)
def test_what_cannot_be_done_is_refused(flags, said, tmp_path, monkeypatch, capsys):
    source = written("mixtral", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([source, *flags.split()]) == 2
    assert said in capsys.readouterr().err
