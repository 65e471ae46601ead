"""Every use of TensorRT in the package against the documented signatures of the real bindings, without a GPU."""

import ast

import pytest
from trt_checker import Checker
from trt_surface import parse, signatures, sources

WRONG = """
import tensorrt as trt

class Log(trt.ILogger):
    def log(self, severity, msg):
        {override}

def build(parser: trt.OnnxParser, config: trt.IBuilderConfig):
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    {line}
"""

REGISTRY = "registry: trt.IPluginRegistry = trt.get_plugin_registry()"


def complaints(surface, line, override="pass"):
    return Checker(surface).check(ast.parse(WRONG.format(line=line, override=override))).complaints


@pytest.mark.parametrize("file", sources(), ids=lambda file: file.name)
def test_every_name_and_argument_that_the_package_uses_exists(surface, file):
    checker = Checker(surface).check(parse(file))
    assert checker.complaints == []


def test_the_walk_sees_what_the_package_uses(surface):
    uses = set()
    for file in sources():
        uses |= Checker(surface).check(parse(file)).uses
    assert len(uses) >= 60
    assert {
        "Builder.build_serialized_network",
        "BuilderFlag.SPARSE_WEIGHTS",
        "EngineInspector.get_engine_information",
        "IAttention.decomposable",
        "IBuilderConfig.set_timing_cache",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.set_tensor_address",
        "ICudaEngine.get_tensor_profile_shape",
        "ILogger.log",
        "IOptimizationProfile.set_shape",
        "IPluginRegistry.get_creator",
        "IPluginRegistry.load_library",
        "IProgressMonitor.step_complete",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParser.parse_from_file",
        "ParserError.node_operator",
        "Runtime.deserialize_cuda_engine",
    } <= uses


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("builder.create_builder_confg()", "Builder has no create_builder_confg"),
        ("trt.Bilder(log)", "tensorrt has no Bilder"),
        ("trt.BuilderFlag.SPARSE_WEIGHT", "BuilderFlag has no SPARSE_WEIGHT"),
        ("trt.Builder()", "Builder does not take ()"),
        ("builder.build_serialized_network(network)", "build_serialized_network does not take (network)"),
        ("config.set_timing_cache(None, ignore=False)", "set_timing_cache does not take (None, ignore=False)"),
        ("config.progress_monitr = None", "IBuilderConfig has no property progress_monitr"),
        ("config.num_optimization_profiles = 1", "IBuilderConfig.num_optimization_profiles cannot be set"),
        ("[parser.get_error(i).descr() for i in range(parser.num_errors)]", "ParserError has no descr"),
        (f"{REGISTRY}; registry.load_libary('x')", "IPluginRegistry has no load_libary"),
        (f"{REGISTRY}; registry.get_creator('x')", "get_creator does not take ('x')"),
        ("unknown().set_tensor_address('x', 0)", "set_tensor_address is used on something of unknown type"),
        ("config.create_timing_cache(b'').serialise()", "ITimingCache has no serialise"),
        ("trt.NetworkDefinitionCreationFlag.EXPLICIT_PATCH", "has no EXPLICIT_PATCH"),
    ],
)
def test_a_misspelt_name_or_a_wrong_argument_fails(surface, line, said):
    (complaint,) = complaints(surface, line)
    assert said in complaint


def test_an_override_that_nothing_calls_fails(surface):
    assert complaints(surface, "pass") == []
    tree = ast.parse(WRONG.format(line="pass", override="pass").replace("def log(", "def lgo("))
    assert Checker(surface).check(tree).complaints == ["line 5: ILogger has no lgo to override"]
    tree = ast.parse(WRONG.format(line="pass", override="pass").replace("severity, msg", "level, msg"))
    assert "other arguments" in Checker(surface).check(tree).complaints[0]


def test_what_only_one_version_has_is_told_apart(surface):
    gone = complaints(surface, "trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH")
    assert bool(gone) == surface.version.startswith("11.")


def test_signatures_are_read_from_docstrings():
    (one,) = signatures("f(self: a.B, n: typing.SupportsInt = 3, xs: list[tuple[int, int]]) -> a.b.C\n\nText.")
    assert one.returns == "C"
    assert set(one.signature.parameters) == {"self", "n", "xs"}
    doc = "f(*args, **kwargs)\nOverloaded function.\n\n1. f(x: int) -> None\n\n2. f(y: a.B = <B.C: 0>) -> list[a.B]\n"
    assert [method.returns for method in signatures(doc)] == ["None", "list[B]"]
