"""``-o model.plan``: what is written without TensorRT, and the engine built in place by a double."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from commands import names
from families import VOCABULARY, random_model
from safetensors.torch import save_file
from sparsify_export import engine
from sparsify_export.calibrate.eight_bit import rounded
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.cli import main
from sparsify_export.engine import _tell, _worth
from sparsify_export.frontdoor import tokenizer_of
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.onnx.plugin import LIBRARY
from sparsify_export.passes.onnx.tensorrt import DOCUMENTED
from sparsify_export.runtime import tensorrt
from sparsify_export.runtime.generate import generate, greedy_torch
from sparsify_export.runtime.inspection import weights
from sparsify_export.runtime.published import put_weights
from sparsify_export.runtime.session import CausalSession, open_session
from sparsify_export.runtime.tensorrt.linears import PlanLinear, eligibility
from sparsify_export.settings import Console
from sparsify_export.target import Target
from trt_double import Double
from trt_surface import VERSIONS, WHEELS, read_surface

SHORT = ["--effort", "fast", "--samples", "4", "--seq-len", "32"]


@pytest.fixture(scope="module")
def written(folder, text, tmp_path_factory):
    """What ``-o model.plan`` writes of a decoder where there is no TensorRT."""
    out = tmp_path_factory.mktemp("engine") / "model.plan"
    arguments = [str(folder), "--nm", "2:4", "--calibration", str(text), *SHORT, "--quiet"]
    assert main([*arguments, "--context", "64", "--batch", "1,1,2", "-o", str(out)]) == 3
    return out


def test_onnx_and_script_are_in_place_and_no_engine(written):
    assert names(written.parent) == {
        "model.trt.onnx", "model.trt.onnx.data", "model.trt.json", "build_plan.py", "model.plan.report.json",
    }  # fmt: skip
    script = written.parent / "build_plan.py"
    assert script.read_bytes() == Path(tensorrt.__file__).with_name("build_plan.py").read_bytes()
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    (said,) = done.stderr.splitlines()
    assert said.startswith("build_plan.py: TensorRT is not installed here; building an engine needs TensorRT 10.15")


def test_the_onnx_file_is_what_tensorrt_takes(written):
    file = written.with_name("model.trt.onnx")
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(file)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 23)}
    assert {(node.domain, node.op_type) for node in model.graph.node} <= {("", name) for name in DOCUMENTED}
    assert len(model.functions) == 0
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    assert [(len(node.input), len(node.output)) for node in attention] == [(4, 1)] * 2
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    floats = {name: kind for name, kind in types.items() if name not in ("input_ids", "attention_mask")}
    assert set(floats.values()) == {onnx.TensorProto.FLOAT16}
    sparse = [(info.path, w) for info, w in weights(file) if info.path != "lm_head"]
    assert len(sparse) == 8
    for path, weight in sparse:
        assert weight.dtype == torch.float16, path
        assert int((weight.reshape(len(weight), -1, 4) != 0).sum(2).max()) == 2, path
        assert not bool(((weight == 0) & weight.signbit()).any()), path


def test_onnx_runtime_writes_the_greedy_text_of_the_torch_model(written):
    file = written.with_name("model.trt.onnx")
    model = random_model("llama")
    state = model.state_dict()
    params = {}
    for info, weight in weights(file):
        module, _, names = info.path.rpartition(".")
        paths = [f"{module}.{name}".lstrip(".") for name in names.split("+")]
        rows = [len(state[f"{path}.weight"]) for path in paths]
        params.update(zip((f"model.{path}.weight" for path in paths), weight.float().split(rows), strict=True))
    put_weights(model, params, {})
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    prompts = [[5, 6, 7, 8]]
    got = generate(CausalSession(open_session(file)), prompts, max_new_tokens=16).tokens
    assert got == greedy_torch(model, prompts, max_new_tokens=16)
    assert len(got[0]) == 16
    assert max(got[0]) < VOCABULARY


def test_options_and_report_say_what_is_wanted_and_possible(written):
    options = json.loads(written.with_name("model.trt.json").read_text())
    assert options["onnx"] == "model.trt.onnx"
    assert options["sparse"]
    assert options["profiles"]["prefill"]["attention_mask"] == [[1, 1], [1, 16], [2, 64]]
    assert options["profiles"]["decode"]["input_ids"] == [[1, 1], [1, 1], [2, 1]]
    linears = {linear["name"]: linear for linear in options["linears"]}
    gate = linears["model.layers.0.mlp.gate_proj+up_proj"]
    assert (gate["k"], gate["n"], gate["pattern"], gate["eligible"]) == (64, 256, "2:4", "maybe")
    assert linears["lm_head"]["reason"] == "the weight is not 2:4"
    report = json.loads(written.with_name("model.plan.report.json").read_text())
    assert report["engine"]["not_built"] == "TensorRT is not installed here"
    assert [entry["how"] for entry in report["verified"]] == ["ONNX Runtime", "ONNX Runtime, decoding"]
    assert report["settings"]["dtype"] == "fp16"


@pytest.fixture(scope="module")
def plugged(folder, text, tmp_path_factory):
    """The same with zeros anywhere."""
    out = tmp_path_factory.mktemp("engine") / "model.plan"
    arguments = [str(folder), "--sparsity", "0.5", "--calibration", str(text), *SHORT]
    assert main([*arguments, "--quiet", "-o", str(out)]) == 3
    return out


def test_zeros_anywhere_become_nodes_of_the_plugin(plugged):
    file = plugged.with_name("model.trt.onnx")
    # In a process of its own: in this one onnx knows our op, whose x is float32.
    check = "import onnx, sys; onnx.checker.check_model(sys.argv[1], full_check=True)"
    subprocess.run([sys.executable, "-c", check, file], check=True)
    model = onnx.load(file)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 23), ("sparsify", 1)}
    assert len(model.functions) == 0  # one of this name would be taken for the plugin
    nodes = [node for node in model.graph.node if node.domain == "sparsify"]
    assert {node.op_type for node in nodes} == {"linear_bitmask"}
    assert len(nodes) == 8
    assert {node.op_type for node in model.graph.node if node not in nodes} <= DOCUMENTED
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    kinds = onnx.TensorProto
    for node in nodes:
        assert [stored[name].data_type for name in node.input[1:]] == [kinds.FLOAT16, kinds.INT32, kinds.INT64]
        (columns,) = [attribute.i for attribute in node.attribute]
        rows = stored[node.input[3]].dims[0] - 1
        assert list(stored[node.input[2]].dims) == [rows * columns // 32]
        assert [attribute.name for attribute in node.attribute] == ["in_features"]
    # Every weight is read back with half of it zero, none of them negative.
    sparse = [(info, weight) for info, weight in weights(file) if info.op == "linear_bitmask"]
    assert [info.pattern for info, _ in sparse] == ["50.0% zeros"] * 8
    assert all(float((weight == 0).float().mean()) == 0.5 for _, weight in sparse)


def test_the_plugin_is_verified_as_our_op_and_asked_for(plugged):
    report = json.loads(plugged.with_name("model.plan.report.json").read_text())
    ways = [f"ONNX Runtime, plugins as {what}" for what in ("our CPU kernels", "functions")]
    assert [entry["how"] for entry in report["verified"]] == [
        ways[0],
        f"{ways[0]}, decoding",
        ways[1],
        f"{ways[1]}, decoding",
    ]
    options = json.loads(plugged.with_name("model.trt.json").read_text())
    assert [linear["plugin"] for linear in options["linears"]] == ["linear_bitmask"] * 8 + [""]
    assert not options["sparse"]
    assert names(plugged.parent) == {
        "model.trt.onnx", "model.trt.onnx.data", "model.trt.json", "build_plan.py", "model.plan.report.json",
    }  # fmt: skip
    assert main(["inspect", str(plugged.with_name("model.trt.onnx"))]) == 0


def test_a_damaged_mask_of_the_plugin_does_not_pass(plugged, tmp_path):
    file = plugged.with_name("model.trt.onnx")
    model = onnx.load(file)
    node = next(node for node in model.graph.node if node.domain == "sparsify")
    words = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[2])
    array = onnx.numpy_helper.to_array(words).copy()
    array[0] ^= 1 << 3
    words.CopyFrom(onnx.numpy_helper.from_array(array, words.name))
    onnx.save(model, tmp_path / "model.trt.onnx")
    with pytest.raises(InputError, match="the file is damaged"):
        list(weights(tmp_path / "model.trt.onnx"))


def test_2_4_becomes_nodes_of_the_plugin_where_it_is_asked_for(images, tmp_path, capsys):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    rng = np.random.default_rng(0)
    np.savez(inputs / "0.npz", pixel_values=rng.standard_normal((2, 3, 32, 32), np.float32))
    out = tmp_path / "out"
    out.mkdir()
    arguments = [str(images), "--nm", "2:4", "--effort", "fast", "--calibration-inputs", str(inputs)]
    assert main([*arguments, "--ops", "sparse", "-o", str(out / "m.plan")]) == 3
    model = onnx.load(out / "m.trt.onnx")
    nodes = [node for node in model.graph.node if node.domain == "sparsify"]
    assert {node.op_type for node in nodes} == {"linear_nm"}
    assert len(model.functions) == 0
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    kinds = onnx.TensorProto
    for node in nodes:
        assert {attribute.name: attribute.i for attribute in node.attribute} == {"n": 2, "m": 4}
        given = [stored[name].data_type for name in node.input[1:]]
        assert given in ([kinds.FLOAT16, kinds.INT32], [kinds.FLOAT16, kinds.INT32, kinds.FLOAT])
        rows, kept = stored[node.input[1]].dims
        assert list(stored[node.input[2]].dims) == [rows * kept // 16]
    report = json.loads((out / "m.plan.report.json").read_text())
    ways = ["ONNX Runtime, plugins as our CPU kernels", "ONNX Runtime, plugins as functions"]
    assert [entry["how"] for entry in report["verified"]] == ways
    options = json.loads((out / "m.trt.json").read_text())
    plugged = [linear for linear in options["linears"] if linear["plugin"] == "linear_nm"]
    assert len(plugged) == len(nodes)
    assert {linear["pattern"] for linear in plugged} == {"2:4"}
    assert not options["sparse"]  # nothing is left for TensorRT's own sparse tactics
    sparse = [(info, weight) for info, weight in weights(out / "m.trt.onnx") if info.op == "linear_nm"]
    assert all(float((weight == 0).float().mean()) == 0.5 for _, weight in sparse)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{len(nodes)} linears are run by the plugins in libsparsify_tensorrt.so" in said


@pytest.mark.parametrize(
    ("ops", "pattern", "plugin"),
    [
        (None, NM(2, 4), False),
        (None, Unstructured(0.5), True),
        ("sparse", NM(2, 4), True),
        ("sparse", NM(4, 8), False),  # the plugin has 2:4 only
        ("sparse", Unstructured(0.5), True),
        ("standard", NM(2, 4), False),
        ("standard", Unstructured(0.5), False),
    ],
)
def test_which_linears_a_plugin_runs(ops, pattern, plugin):
    assert (_worth(ops, pattern, 64, 64, 2048) == "") is plugin


@pytest.mark.slow
def test_a_given_mask_makes_plugins_where_it_has_no_pattern(folder, text, tmp_path, capsys):
    """In bfloat16: one linear of a mask without a pattern, one of a 2:4 mask, so the plugin and a plain product."""
    generator = torch.Generator().manual_seed(0)
    free = torch.rand(64, 128, generator=generator) < 0.5
    pairs = torch.tensor([1, 1, 0, 0], dtype=torch.bool).repeat(64, 32)
    paths = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    save_file(dict(zip(paths, (free, pairs), strict=True)), tmp_path / "masks.safetensors")
    out = tmp_path / "m.plan"
    arguments = [str(folder), "--mask", str(tmp_path / "masks.safetensors"), "--calibration", str(text), *SHORT]
    assert main([*arguments, "--permute", "none", "--dtype", "bf16", "-o", str(out)]) == 3
    linears = {linear["name"]: linear for linear in json.loads((tmp_path / "m.trt.json").read_text())["linears"]}
    assert linears[paths[0]]["plugin"] == "linear_bitmask"
    assert (linears[paths[1]]["plugin"], linears[paths[1]]["pattern"], linears[paths[1]]["eligible"]) == (
        "",
        "2:4",
        "maybe",
    )
    report = json.loads((tmp_path / "m.plan.report.json").read_text())
    how = "ONNX Runtime, a float32 twin, plugins as functions"
    assert [entry["how"] for entry in report["verified"]][2:] == [how, f"{how}, decoding"]
    said = " ".join(capsys.readouterr().err.split())
    assert "1 linears are run by the plugins in libsparsify_tensorrt.so" in said
    assert "with TensorRT 10.15 or newer, libsparsify_tensorrt.so and an NVIDIA GPU" in said


@pytest.fixture(scope="module")
def quantised(folder, text, tmp_path_factory):
    """A decoder of int8 codes, put on their grid by a sweep, where one of three linears that read the same is dense."""
    out = tmp_path_factory.mktemp("engine") / "model.plan"
    arguments = [str(folder), "--nm", "2:4", "--dtype", "int8", "--quantise", "sweep", "--skip", "*.0.*.k_proj"]
    assert main([*arguments, "--calibration", str(text), *SHORT, "--quiet", "-o", str(out)]) == 3
    return out


def test_pruned_products_are_of_codes_and_the_rest_is_fp16(quantised):
    file = quantised.with_name("model.trt.onnx")
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(file)
    ops = [node.op_type for node in model.graph.node]
    assert set(ops) <= DOCUMENTED
    assert (ops.count("QuantizeLinear"), ops.count("DequantizeLinear")) == (8, 16)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {info.path: (info, weight) for info, weight in weights(file)}
    coded = {path for path, (info, _) in found.items() if info.bits == 8}
    assert set(found) - coded == {"model.layers.0.self_attn.k_proj", "lm_head"}
    assert "model.layers.0.self_attn.q_proj+v_proj" in coded
    for path in coded:
        info, weight = found[path]
        codes = onnx.numpy_helper.to_array(stored[info.weight])  # [K, N]
        assert codes.dtype == np.int8
        assert (codes.reshape(-1, 4, codes.shape[1]) != 0).sum(axis=1).max() == 2
        assert abs(codes.astype(int)).max() <= 127
        assert not bool(((weight == 0) & weight.signbit()).any())
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert set(types.values()) == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}


def test_codes_are_told_in_the_options_and_in_the_report(quantised):
    linears = {x["name"]: x for x in json.loads(quantised.with_name("model.trt.json").read_text())["linears"]}
    gate = linears["model.layers.0.mlp.gate_proj+up_proj"]
    assert (gate["bits"], gate["pattern"], gate["eligible"]) == (8, "2:4", "maybe")
    assert gate["reason"] == "TensorRT may run a product between Q and DQ dense (NVIDIA/TensorRT#4694)"
    report = json.loads(quantised.with_name("model.plan.report.json").read_text())
    assert (report["settings"]["dtype"], report["settings"]["quantise"]) == ("int8", "sweep")
    entries = {entry["path"]: entry for entry in report["linears"]}
    down = entries["model.layers.1.mlp.down_proj"]
    assert down["stored_bytes"] == 64 * 128 + 64 * 2
    assert down["reason"] == "a MatMul of int8 codes between Q and DQ, for TensorRT to choose a tactic"
    assert down["error_quantised"] > 0
    assert entries["model.layers.0.self_attn.k_proj"]["stored_bytes"] == 32 * 64 * 2


def test_onnx_runtime_writes_the_text_of_the_torch_model_with_the_same_rounding(quantised):
    file = quantised.with_name("model.trt.onnx")
    model, graph = random_model("llama"), onnx.load(file).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {node.output[0]: node for node in graph.node}
    scales = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[0] in producers:
            source = producers[node.input[0]]
            if source.op_type == "DequantizeLinear":
                scales[node.name] = float(stored[source.input[1]])
    state, params, rounds = model.state_dict(), {}, {}
    for info, weight in weights(file):
        module, _, names = info.path.rpartition(".")
        paths = [f"{module}.{name}".lstrip(".") for name in names.split("+")]
        rows = [len(state[f"{path}.weight"]) for path in paths]
        params.update(zip((f"model.{path}.weight" for path in paths), weight.float().split(rows), strict=True))
        rounds |= {path: scales[info.path] for path in paths if info.path in scales}
    put_weights(model, params, {})
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    for path, scale in rounds.items():
        model.get_submodule(path).register_forward_pre_hook(lambda _, x, s=scale: (rounded(x[0], s, "int8"),))
    assert len(rounds) == 13
    prompts = [[5, 6, 7, 8]]
    got = generate(CausalSession(open_session(file)), prompts, max_new_tokens=16).tokens
    assert got == greedy_torch(model, prompts, max_new_tokens=16)


def test_float8_products_of_a_model_of_images(images, tmp_path, capsys):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    np.savez(inputs / "0.npz", pixel_values=np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32))
    arguments = [str(images), "--nm", "2:4", "--effort", "fast", "--calibration-inputs", str(inputs)]
    assert main([*arguments, "--dtype", "fp8", "-o", str(tmp_path / "m.plan")]) == 3
    file = tmp_path / "m.trt.onnx"
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(file, load_external_data=False)
    kinds = [tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 2]
    assert kinds.count(onnx.TensorProto.FLOAT8E4M3FN) == 8
    assert {node.op_type for node in model.graph.node} <= DOCUMENTED
    coded = [(info, weight) for info, weight in weights(file) if info.bits == 8]
    assert [info.pattern for info, _ in coded] == ["2:4"] * 8
    assert not any(bool(((weight == 0) & weight.signbit()).any()) for _, weight in coded)
    told = capsys.readouterr()
    said = " ".join((told.out + told.err).split())
    assert "8 products are of 8-bit codes between Q and DQ, which TensorRT may run dense" in said
    assert "(NVIDIA/TensorRT#4694)" in said


def test_the_library_of_an_installation_is_put_beside_the_engine(tmp_path, monkeypatch):
    target = Target.check(str(tmp_path / "m.plan"), overwrite=False)
    target.open()
    monkeypatch.setattr(engine, "__file__", str(tmp_path / "installed" / "engine.py"))
    assert engine._library(target) == tmp_path / LIBRARY  # what may be there already
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / LIBRARY).write_bytes(b"plugins")
    assert engine._library(target) == target.stage / LIBRARY
    assert (target.stage / LIBRARY).read_bytes() == b"plugins"


def test_an_engine_takes_the_tokenizer_that_is_named_or_lies_beside_it(written, folder, tmp_path):
    with pytest.raises(InputError, match="has no tokenizer beside it; give --tokenizer"):
        tokenizer_of(written, None)
    assert tokenizer_of(written, str(folder))("w1 w2")["input_ids"] == [4, 5]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "m.trt.onnx").write_bytes(written.with_name("model.trt.onnx").read_bytes())
    assert tokenizer_of(tmp_path / "m.plan", None)("w1 w2")["input_ids"] == [4, 5]


def test_what_is_there_is_not_replaced(written, folder, capsys):
    assert main([str(folder), "--quiet", "-o", str(written)]) == 2
    assert "exists already; remove it or give --overwrite" in capsys.readouterr().err


@pytest.fixture
def double(tmp_path_factory, monkeypatch):
    """TensorRT 11.4, as far as its bindings tell."""
    if not (WHEELS / VERSIONS[1] / "tensorrt_bindings").is_dir():
        pytest.skip(f"the bindings of TensorRT {VERSIONS[1]} are not in {WHEELS}; `make test` puts them there")
    double = Double(read_surface(VERSIONS[1], tmp_path_factory.mktemp("stub")), {})
    double.script |= {
        "Builder.build_serialized_network": lambda self, network, config: double.IHostMemory(b"engine"),
        "ITimingCache.serialize": lambda self: double.IHostMemory(b"timed"),
        "EngineInspector.get_engine_information": json.dumps({"Layers": []}),
        "ICudaEngine.get_engine_stat": 123,
    }
    monkeypatch.setitem(sys.modules, "tensorrt", double)
    monkeypatch.delitem(sys.modules, "sparsify_export.runtime.tensorrt.build_plan", raising=False)
    yield double
    sys.modules.pop("sparsify_export.runtime.tensorrt.build_plan", None)  # it holds the double


def test_the_engine_is_built_in_place_where_tensorrt_is(images, double, tmp_path, capsys):
    """A bfloat16 model of images; fp16 with a decoder is what the others have."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        np.savez(inputs / f"{index}.npz", pixel_values=rng.standard_normal((2, 3, 32, 32), np.float32))
    out = tmp_path / "out"
    out.mkdir()
    arguments = [str(images), "--nm", "2:4", "--effort", "fast", "--calibration-inputs", str(inputs)]
    arguments += ["--dtype", "bf16", "--batch", "1,4,8", "--workspace", "256", "--level", "5", "-o"]
    arguments.append(str(out / "m.plan"))
    assert main(arguments) == 0
    assert names(out) == {
        "m.trt.onnx", "m.trt.onnx.data", "m.trt.json", "build_plan.py", "m.plan.report.json", "m.plan", "m.dense.plan",
        "m.timing.cache",
    }  # fmt: skip
    assert (out / "m.plan").read_bytes() == b"engine"
    assert double.called("IBuilderConfig.set_flag") == [(double.BuilderFlag.SPARSE_WEIGHTS,)]
    assert double.called("IBuilderConfig.builder_optimization_level") == [(5,)] * 2
    report = json.loads((out / "m.plan.report.json").read_text())
    assert report["engine"]["tensorrt"] == VERSIONS[1]
    assert report["engine"]["not_built"] == ""
    assert {linear["picked"] for linear in report["engine"]["linears"]} == {"unknown"}
    assert [entry["how"] for entry in report["verified"]] == ["ONNX Runtime, a float32 twin"]
    said = capsys.readouterr().out
    assert "sparse tactics" in said
    assert "wrote" in said

    # What TensorRT cannot build leaves the ONNX file and the script, and says why.
    built = iter([double.IHostMemory(b"engine"), None])
    double.script["Builder.build_serialized_network"] = lambda self, network, config: next(built)
    assert main([*arguments, "--overwrite", "--quiet"]) == 3
    assert "m.plan was not built: TensorRT built nothing" in capsys.readouterr().err
    assert {file.suffix for file in out.iterdir()} == {".onnx", ".data", ".json", ".py", ".cache"}


@pytest.mark.parametrize(
    ("k", "dtype", "said"),
    [
        (64, torch.float32, "2:4 tensor cores need 16 bits or less, so this fp32 engine will run dense"),
        (72, torch.float16, "1 of 2 2:4 linears will run dense: layers.0.up, K = 72 is not a multiple of 16"),
        (64, torch.float16, None),
    ],
)
def test_zeros_that_cannot_help_are_named_beforehand(k, dtype, said):
    linears = [
        PlanLinear(name, size, 64, "2:4", *eligibility(size, 64, two_of_four=True, bits=8 * dtype.itemsize))
        for name, size in (("layers.0.up", k), ("layers.0.down", 128))
    ]
    notes = []
    _tell(linears, dtype, Console(note=notes.append))
    assert [note.partition(";")[0] for note in notes] == ([] if said is None else [said])
