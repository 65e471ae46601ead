"""The builder, as the script that is written, against a double that offers what the real bindings do."""

import contextlib
import importlib.util
import json
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from sparsify_export.runtime import tensorrt
from sparsify_export.signals import Stopped, stoppable
from trt_double import Double

SCRIPT = Path(tensorrt.__file__).with_name("build_plan.py")
SHAPES = {"input_ids": [[1, 1], [1, 8], [2, 16]], "past_key_values.0.key": [[1, 2, 0, 4], [1, 2, 0, 4], [2, 2, 15, 4]]}
LINEARS = [
    {"name": "layers.0.up", "k": 64, "n": 64, "pattern": "2:4", "eligible": "yes", "reason": "", "plugin": ""},
    {"name": "layers.1.up", "k": 64, "n": 64, "pattern": "2:4", "eligible": "yes", "reason": "", "plugin": ""},
    {"name": "layers.1.down", "k": 64, "n": 64, "pattern": "2:4", "eligible": "yes", "reason": "", "plugin": ""},
    {
        "name": "lm_head",
        "k": 64,
        "n": 96,
        "pattern": None,
        "eligible": "no",
        "reason": "the weight is not 2:4",
        "plugin": "",
    },
]
PLUGGED = [{**LINEARS[0], "pattern": "50.0% zeros", "eligible": "no", "plugin": "linear_bitmask"}, LINEARS[3]]
LAYERS = [
    {"Name": "layers.0.up_myl0_3", "TacticName": "sm80_xmma_sparse_gemm_f16f16", "HasSparseWeights": 1},
    {"Name": "fused", "Metadata": "[ONNX Layer: layers.1.up]\x1e[ONNX Layer: add]", "TacticName": "kgen_17"},
    {"Name": "gemm", "Metadata": "[ONNX Layer: layers.1.down]", "TacticName": "sm80_xmma_gemm_f16f16"},
    "only a name",
]
OPTIONS = {
    "onnx": "m.trt.onnx",
    "plan": "m.plan",
    "profiles": {"prefill": SHAPES, "decode": SHAPES},
    "linears": LINEARS,
    "sparse": True,
    "workspace_mib": 64,
    "timing_cache": "m.timing.cache",
    "source": "model",
}


@pytest.fixture
def build(surface, tmp_path, monkeypatch):
    """Runs the script on a double; returns its exit code and the double."""

    def run(script=None, version=None, arguments=(), **options):
        double = Double(surface, {})
        double.script.update(
            {
                "Builder.build_serialized_network": lambda self, network, config: double.IHostMemory(b"engine"),
                "ITimingCache.serialize": lambda self: double.IHostMemory(b"timed"),
                "EngineInspector.get_engine_information": json.dumps({"Layers": LAYERS}),
                "ICudaEngine.get_engine_stat": 123,
                "INetworkDefinition.num_layers": 2,
                "ILayer.type": double.LayerType.ATTENTION_INPUT,
                **(script(double) if script else {}),
            }
        )
        if version:
            double.__version__ = version
        monkeypatch.setitem(sys.modules, "tensorrt", double)
        copied = tmp_path / "build_plan.py"
        copied.write_bytes(SCRIPT.read_bytes())
        monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a script that is run as one leaves none
        spec = importlib.util.spec_from_file_location("script", copied)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "script", module)  # its dataclasses look themselves up
        spec.loader.exec_module(module)
        (tmp_path / "m.trt.json").write_text(json.dumps({**OPTIONS, **options}))
        return module.main([*arguments]), double

    return run


def test_the_whole_build(build, tmp_path, capsys):
    code, double = build()
    assert code == 0
    names = {file.name for file in tmp_path.iterdir()}
    written = {"m.plan", "m.dense.plan", "m.timing.cache", "m.plan.layers.json"}
    assert names == written | {"build_plan.py", "m.trt.json"}
    assert (tmp_path / "m.plan").read_bytes() == b"engine"
    assert (tmp_path / "m.timing.cache").read_bytes() == b"timed"
    # The sparse engine first, then the one to compare with; no other flag is ever set.
    assert double.called("IBuilderConfig.set_flag") == [(double.BuilderFlag.SPARSE_WEIGHTS,)]
    assert len(double.called("Builder.build_serialized_network")) == 2
    strongly = 1 << int(double.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert double.called("Builder.create_network") == [(strongly,)] * 2
    assert double.called("OnnxParser.parse_from_file") == [(str(tmp_path / "m.trt.onnx"),)] * 2
    limit = (double.MemoryPoolType.WORKSPACE, 64 << 20)
    assert double.called("IBuilderConfig.set_memory_pool_limit") == [limit] * 2
    assert len(double.called("IBuilderConfig.add_optimization_profile")) == 4
    assert [arguments[0] for arguments in double.called("IOptimizationProfile.set_shape")] == [*SHAPES] * 4
    assert ([1, 1],) in double.called("Dims")
    assert double.called("IAttention.decomposable") == [(True,)] * 4
    assert [bytes(cache) for (cache,) in double.called("IBuilderConfig.create_timing_cache")] == [b"", b"timed"]
    said = capsys.readouterr().out
    assert "sparse tactics: 1 of 3 eligible 2:4 linears, 1 dense, 1 unknown, of 4 linears in all" in said
    assert "layers.1.up: unknown, inside a fused node" in said
    found = json.loads((tmp_path / "m.plan.layers.json").read_text())
    assert [linear["picked"] for linear in found["linears"]] == ["yes", "unknown", "no", "unknown"]
    assert found["linears"][0]["has_sparse_weights"] == 1
    assert found["dense_plan_bytes"] == 6
    assert found["dense_weight_bytes"] == 123


def test_the_log_is_believed_before_the_inspector(build, tmp_path):
    def script(double):
        def make(self, network, config):
            log = double.called("Builder")[-1][0]
            info = double.ILogger.INFO
            log.log(info, "(Sparsity) Layers eligible for sparse math: layers.0.up, layers.1.up, layers.1.down")
            log.log(info, "(Sparsity) TRT inference plan picked sparse implementation for layers: layers.1.up")
            log.log(info, "something else")
            return double.IHostMemory(b"engine")

        return {"Builder.build_serialized_network": make}

    assert build(script)[0] == 0
    found = json.loads((tmp_path / "m.plan.layers.json").read_text())
    assert len(found["log"]) == 2
    assert [(linear["picked"], linear["why"]) for linear in found["linears"]] == [
        ("yes", "the tactic is a sparse one"),
        ("yes", "the log says so"),
        ("no", "eligible, but a dense tactic was faster"),
        ("unknown", "no layer of the engine names it"),
    ]


def test_warnings_are_kept_and_shown(build, tmp_path, capsys):
    def script(double):
        def make(self, network, config):
            log = double.called("Builder")[-1][0]
            for _ in range(2):
                log.log(double.ILogger.WARNING, "profile 0 is ignored")
            log.log(double.ILogger.INFO, "nothing")
            return double.IHostMemory(b"engine")

        return {"Builder.build_serialized_network": make}

    assert build(script)[0] == 0
    assert json.loads((tmp_path / "m.plan.layers.json").read_text())["warnings"] == ["profile 0 is ignored"]
    assert capsys.readouterr().out.splitlines()[-1] == "TensorRT warns: profile 0 is ignored"


def test_the_level_is_that_of_the_options(build):
    """Both engines are built alike, or they could not be compared."""
    for given, wanted in (({}, 3), ({"level": 5}, 5)):
        assert build(**given)[1].called("IBuilderConfig.builder_optimization_level") == [(wanted,)] * 2


def test_a_dense_model_gets_one_engine_and_no_flag(build, tmp_path):
    code, double = build(sparse=False, workspace_mib=None)
    assert code == 0
    assert double.called("IBuilderConfig.set_flag") == []
    assert double.called("IBuilderConfig.set_memory_pool_limit") == []
    assert not (tmp_path / "m.dense.plan").exists()


def test_progress_is_shown_and_ctrl_c_stops_the_build(build):
    def script(double):
        def make(self, network, config):
            monitor = double.called("IBuilderConfig.progress_monitor")[-1][0]
            monitor.phase_start("Building", None, 2)
            monitor.phase_start("Tactics", "Building", 3)
            monitor.phase_start("One tactic", "Tactics", 9)
            assert monitor.step_complete("Tactics", 0)
            monitor.phase_finish("Tactics")
            seen = monitor._show
            monitor._show = interrupt
            assert not monitor.step_complete("Building", 0)
            monitor._show = seen
            return None

        return {"Builder.build_serialized_network": make}

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(script)


def dropping(*calls):
    """Call as the bindings do: exceptions of a logger and of ``phase_start`` go nowhere."""
    for call in calls:
        with contextlib.suppress(BaseException):
            call()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["parser", "logger", "phase_start"])
def test_a_signal_whose_exception_the_bindings_drop_stops_the_build(build, tmp_path, number, where):
    steps = []

    def script(double):
        def make(self, network, config):
            monitor = double.called("IBuilderConfig.progress_monitor")[-1][0]
            log = double.called("Builder")[-1][0]
            if where == "phase_start":
                monitor._show = lambda *_: signal.raise_signal(number)
            dropping(lambda: monitor.phase_start("Building", None, 9))
            if where == "logger":
                log.errors = SimpleNamespace(append=lambda message: signal.raise_signal(number))
                dropping(lambda: log.log(double.ILogger.ERROR, "an error"))
            monitor._show = lambda *_: None
            steps.append(monitor.step_complete("Building", 0))
            return None if not steps[-1] else double.IHostMemory(b"engine")

        def parse(self, path):
            dropping(lambda: signal.raise_signal(number) if where == "parser" else None)
            return True

        return {"Builder.build_serialized_network": make, "OnnxParser.parse_from_file": parse}

    kept = signal.set_wakeup_fd(-1)
    with stoppable(), pytest.raises(Stopped) as stopped:
        build(script)
    assert stopped.value.number == number
    assert steps == [False]  # and no second engine is begun
    assert not (tmp_path / "m.plan").exists()
    assert signal.set_wakeup_fd(kept) == -1  # as it was found


def test_a_build_in_another_thread_runs_without_signals(build):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(build).result()[0] == 0


def parser_error(double):
    error = double.value("ParserError")
    return {
        "OnnxParser.parse_from_file": False,
        "OnnxParser.num_errors": 2,
        "OnnxParser.get_error": error,
        "ParserError.node": 7,
        "ParserError.node_name": "layers.0.attention",
        "ParserError.node_operator": "Attention",
        "ParserError.desc": "no past_key",
    }


def no_gpu(double):
    def make(self, logger):
        logger.log(double.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("factory function returned nullptr")

    return {"Builder": make}


def nothing(double):
    def make(self, network, config):
        double.called("Builder")[-1][0].log(double.ILogger.ERROR, "no implementation for node 3")

    return {"Builder.build_serialized_network": make}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (parser_error, "cannot read m.trt.onnx: node 7 layers.0.attention (Attention): no past_key; node 7"),
        (no_gpu, "TensorRT finds no usable GPU: CUDA initialization failure with error: 35"),
        (nothing, "TensorRT built nothing: no implementation for node 3"),
        (lambda double: {"IBuilderConfig.add_optimization_profile": -1}, "refuses the prefill profile"),
        (lambda double: {"Runtime.deserialize_cuda_engine": lambda *_: None}, "cannot read what it built"),
    ],
)
def test_what_fails_is_said_in_one_sentence_and_leaves_no_engine(build, tmp_path, capsys, script, said):
    assert build(script)[0] == 3
    error = capsys.readouterr().err
    assert error.startswith("build_plan.py: ")
    assert said in error
    assert {file.name for file in tmp_path.iterdir()} - {"m.timing.cache"} == {"build_plan.py", "m.trt.json"}


def registry(double, *, known=(), loaded=True):
    """A registry that has the plugin before its library is loaded, after it, or never."""
    known = set(known)

    def load(self, plugin_path):
        known.update(["linear_bitmask"] if loaded else [])
        return object()

    return {
        "get_plugin_registry": lambda: double.value("IPluginRegistry"),
        "IPluginRegistry.load_library": load,
        "IPluginRegistry.get_creator": lambda self, name, version, space: object() if name in known else None,
    }


def test_the_library_of_plugins_is_loaded_once_before_anything_is_parsed(build, tmp_path, capsys):
    library = tmp_path / "libsparsify_tensorrt.so"
    library.write_bytes(b"")
    code, double = build(registry, linears=PLUGGED, sparse=False)
    assert code == 0
    assert double.called("IPluginRegistry.load_library") == [(str(library),)]
    assert set(double.called("IPluginRegistry.get_creator")) == {("linear_bitmask", "1", "sparsify")}
    order = [name for name, _ in double.calls]
    assert order.index("IPluginRegistry.load_library") < order.index("OnnxParser.parse_from_file")
    found = json.loads((tmp_path / "m.plan.layers.json").read_text())
    assert found["linears"][0]["picked"] == "plugin"
    assert found["dense_plan"] is None
    assert "plugin: 1 linears; keep libsparsify_tensorrt.so beside m.plan to run it" in capsys.readouterr().out
    # Elsewhere by its option; and not again where TensorRT has the plugin, as a second build in one process finds.
    other = tmp_path / "other.so"
    library.rename(other)
    code, double = build(registry, linears=PLUGGED, sparse=False, arguments=["--plugins", str(other)])
    assert (code, double.called("IPluginRegistry.load_library")) == (0, [(str(other),)])
    code, double = build(lambda d: registry(d, known=["linear_bitmask"]), linears=PLUGGED, sparse=False)
    assert (code, double.called("IPluginRegistry.load_library")) == (0, [])
    # A model without plugins does not ask for them.
    assert build()[1].called("get_plugin_registry") == []


def test_a_missing_library_or_plugin_is_one_sentence(build, tmp_path, capsys):
    library = tmp_path / "libsparsify_tensorrt.so"

    def said(script):
        assert build(script, linears=PLUGGED, sparse=False)[0] == 3
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert said(registry) == (
        f"build_plan.py: the model needs the plugin linear_bitmask in {library}, which does not exist; put it there, "
        "or give --plugins LIBRARY"
    )
    library.write_bytes(b"")
    assert "holds no plugin linear_bitmask of the namespace sparsify, version 1" in said(
        lambda d: registry(d, loaded=False)
    )
    refuses = {"IPluginRegistry.load_library": lambda self, plugin_path: None}
    assert said(lambda d: {**registry(d), **refuses}) == f"build_plan.py: TensorRT cannot load {library}"
    assert not (tmp_path / "m.plan").exists()


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "10.14.1.48", "12.0.0", "nightly"])
def test_an_unsupported_tensorrt_is_refused(build, capsys, version):
    assert build(version=version)[0] == 3
    assert f"TensorRT {version} is not supported; want 10.15 or newer, or any 11" in capsys.readouterr().err


def test_options_that_are_none_are_refused(build, tmp_path, capsys):
    assert build(nonsense=1)[0] == 3
    assert "m.trt.json does not hold the options of an engine" in capsys.readouterr().err
    (tmp_path / "n.trt.json").write_text("{}")
    assert build()[0] == 2
    assert "want one file of options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("layers.1.up", "[ONNX Layer: layers.1.up]", True),
        ("layers.1.up", "layers.1.up_myl0_12", True),
        ("layers.1.up", "{ForeignNode[layers.1.up...layers.2.down]}", True),
        ("layers.2.down", "{ForeignNode[layers.1.up...layers.2.down]}", True),
        ("layers.1.up", "layers.11.up", False),
        ("layers.1.up", "model.layers.1.up", False),
        ("layers.1.up", "layers.1.up.proj", False),
        ("layers.1.up", "layers.1.upper", False),
        ("a.q+k", "a.q+k", True),
    ],
)
def test_a_linear_is_found_by_its_whole_name(build, name, text, named):
    build()
    assert sys.modules["script"].named(name, text) is named
