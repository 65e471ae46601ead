"""Build a TensorRT engine from the ONNX file and the options beside this file, and say where it is sparse.

This one file is both the builder inside sparsify-export and the script that it writes where no engine can be built:
``python build_plan.py [MODEL.trt.json] [--plugins LIBRARY]`` needs TensorRT 10.15 or newer, an NVIDIA GPU, for linears
with zeros anywhere the library of our plugins, and nothing else; rich shows the progress where it is installed.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEEDS = "TensorRT 10.15 or newer (pip install tensorrt-cu13) and an NVIDIA GPU"
NOT_BUILT = 3
LIBRARY = "libsparsify_tensorrt.so"
NAMESPACE, VERSION = "sparsify", "1"
"""Of our plugins."""

try:
    import tensorrt as trt
except ImportError as error:
    if __name__ != "__main__":
        raise
    WHY = "is not installed here" if error.name == "tensorrt" else f"cannot be imported here ({error})"
    sys.stderr.write(f"build_plan.py: TensorRT {WHY}; building an engine needs {NEEDS}\n")
    sys.exit(NOT_BUILT)

Show = Callable[[str, int, int], object]
SPARSE = re.compile(r"sparse|sptensor|spgemm", re.IGNORECASE)
PRODUCT = re.compile(rf"gemm|gemv|cutlass|xmma|matmul|{SPARSE.pattern}", re.IGNORECASE)
"""What the names of tactics that multiply matrices hold."""

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name))


class PlanError(RuntimeError):
    """The engine cannot be built here; the message says why."""


@dataclass(frozen=True)
class Options:
    """What to build, as the JSON file holds it.

    Attributes:
        onnx: name of the ONNX file, in the folder of the options.
        plan: name of the engine to write there; the one without sparse tactics is called ``.dense.plan``.
        profiles: for every profile its inputs, each with its smallest, typical and largest shape.
        linears: what the ONNX file holds; name, k, n, pattern, whether a sparse tactic is possible, and the plugin.
        sparse: whether a weight is sparse, so that TensorRT may try sparse tactics and an engine without is built too.
        workspace_mib: memory that a tactic may use; None leaves it to TensorRT.
        timing_cache: name of the file that keeps what was timed.
        source: the model that all of this was made from.
        level: how long TensorRT looks for fast tactics, its ``builder_optimization_level``; 3 is its own default.
    """

    onnx: str
    plan: str
    profiles: Mapping[str, Mapping[str, Sequence[Sequence[int]]]]
    linears: Sequence[Mapping[str, Any]]
    sparse: bool
    workspace_mib: int | None
    timing_cache: str
    source: str
    level: int = 3


@dataclass(frozen=True)
class Engine:
    """One engine that was built.

    Attributes:
        plan: its file.
        plan_bytes: of the file.
        weight_bytes: of its weights, as TensorRT counts them.
        log: the lines that TensorRT logs about sparsity.
        warnings: what TensorRT warns of, each once.
        layers: its layers, as the engine inspector describes them.
    """

    plan: Path
    plan_bytes: int
    weight_bytes: int
    log: tuple[str, ...]
    warnings: tuple[str, ...]
    layers: tuple[Any, ...]


class Log(trt.ILogger):
    """Keeps errors, warnings, and what is said about sparsity."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.sparsity: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by TensorRT, from any of its threads."""
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(msg)
        elif "(Sparsity)" in msg:
            self.sparsity.append(msg)
        elif severity == trt.ILogger.WARNING:
            self.warnings.append(msg)


class Stop:
    """Whether a signal has asked to stop while TensorRT works.

    Its bindings drop every exception that a logger or ``phase_start`` raises, and a handler's comes wherever Python
    runs next. What Python writes to the wake-up descriptor is not lost.
    """

    def __init__(self, arrived: int | None) -> None:
        self._arrived = arrived
        self._number = 0

    def asked(self) -> bool:
        """Whether one has."""
        try:
            numbers = os.read(self._arrived, 64) if self._arrived is not None else b""
        except BlockingIOError:
            numbers = b""
        self._number = next((number for number in numbers if number in STOPPING), self._number)
        return self._number != 0

    def raise_again(self) -> None:
        """Raise what the signal's handler raises, if one has."""
        if self.asked():
            signal.raise_signal(self._number)
            raise KeyboardInterrupt  # the handler raised nothing


@contextmanager
def heard() -> Iterator[Stop]:
    """Inside, signals are noted. Outside the main thread, to which Python sends no signals, none is."""
    if threading.current_thread() is not threading.main_thread():
        yield Stop(None)
        return
    arrived, waking = os.pipe()
    os.set_blocking(arrived, False)
    os.set_blocking(waking, False)
    before = signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
    try:
        stop = Stop(arrived)
        yield stop
        stop.raise_again()
    finally:
        signal.set_wakeup_fd(before)
        os.close(arrived)
        os.close(waking)


class Monitor(trt.IProgressMonitor):
    """Shows the two outermost levels of phases; a signal stops the build at the next step."""

    def __init__(self, show: Show, stop: Stop) -> None:
        trt.IProgressMonitor.__init__(self)
        self._show = show
        self._stop = stop
        self.interrupted = False
        self._steps: dict[str, int] = {}
        self._outermost: set[str] = set()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """A phase begins."""
        if not parent_phase:
            self._outermost.add(phase_name)
        if not parent_phase or parent_phase in self._outermost:
            self._steps[phase_name] = num_steps
            self._show(phase_name, 0, num_steps)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """A step of a phase is done; returns whether to go on."""
        try:
            if phase_name in self._steps:
                self._show(phase_name, step + 1, self._steps[phase_name])
        except KeyboardInterrupt:  # it must not travel through TensorRT's own frames
            self.interrupted = True
        return not (self.interrupted or self._stop.asked())

    def phase_finish(self, phase_name: str) -> None:
        """A phase ends."""
        self._steps.pop(phase_name, None)


def build(options: Options, folder: Path, *, show: Show, library: Path | None = None) -> dict[str, Any]:
    """Build the engine, and where a weight may run sparse the same without sparse tactics; returns what was found out.

    Args:
        options: what to build.
        folder: where the ONNX file is, and the engine is written.
        show: told what is being done.
        library: of our plugins; None for ``LIBRARY`` in the folder. It is loaded if the model needs one of them.

    Raises:
        PlanError: this TensorRT is not supported, there is no GPU, a plugin is missing, or TensorRT refuses the model.
    """
    check_version()
    if wanted := sorted({linear["plugin"] for linear in options.linears} - {""}):
        load_plugins(library or folder / LIBRARY, wanted)
    with heard() as stop:
        sparse = build_one(options, folder, folder / options.plan, sparse=options.sparse, show=show, stop=stop)
        dense = None
        if options.sparse:
            beside = folder / f"{options.plan.rpartition('.')[0]}.dense.plan"
            dense = build_one(options, folder, beside, sparse=False, show=show, stop=stop)
    return {
        "tensorrt": trt.__version__,
        "plan": sparse.plan.name,
        "plan_bytes": sparse.plan_bytes,
        "weight_bytes": sparse.weight_bytes,
        "dense_plan": dense.plan.name if dense else None,
        "dense_plan_bytes": dense.plan_bytes if dense else None,
        "dense_weight_bytes": dense.weight_bytes if dense else None,
        "log": list(sparse.log),
        "warnings": list(dict.fromkeys(sparse.warnings + (dense.warnings if dense else ()))),
        "linears": [{**linear, **verdict(linear["name"], linear["plugin"], sparse)} for linear in options.linears],
    }


def check_version() -> None:
    """Refuse a TensorRT that this was not written for."""
    found = re.match(r"(\d+)\.(\d+)", trt.__version__)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (10, 15) <= version < (12, 0):
        raise PlanError(f"TensorRT {trt.__version__} is not supported; want 10.15 or newer, or any 11")


def load_plugins(library: Path, wanted: Sequence[str]) -> None:
    """Load the library of our plugins, unless TensorRT knows them already.

    Raises:
        PlanError: it is not there, cannot be loaded, or lacks a plugin.
    """
    registry: trt.IPluginRegistry = trt.get_plugin_registry()
    if all(registry.get_creator(name, VERSION, NAMESPACE) for name in wanted):
        return
    if not library.is_file():
        raise PlanError(
            f"the model needs the plugin {wanted[0]} in {library}, which does not exist; put it there, or give "
            "--plugins LIBRARY"
        )
    try:
        handle = registry.load_library(str(library.resolve()))
    except (RuntimeError, ValueError) as error:
        raise PlanError(f"TensorRT cannot load {library}: {error}") from error
    if handle is None:
        raise PlanError(f"TensorRT cannot load {library}")
    for name in wanted:
        if registry.get_creator(name, VERSION, NAMESPACE) is None:
            raise PlanError(f"{library} holds no plugin {name} of the namespace {NAMESPACE}, version {VERSION}")


def build_one(options: Options, folder: Path, plan: Path, *, sparse: bool, show: Show, stop: Stop) -> Engine:
    """Build one engine, look inside, and write it beside its place and rename it."""
    log = Log()
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what the bindings raise where TensorRT returns nothing
        raise PlanError(f"TensorRT finds no usable GPU: {' '.join(log.errors) or error}") from error
    trt.init_libnvinfer_plugins(log, "")
    # By name: the number means something else in TensorRT 11, where every network is strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)  # kept until the engine is built: the network only points at its weights
    parse(parser, folder / options.onnx)
    allow_decomposition(network)
    monitor = Monitor(show, stop)
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    config.builder_optimization_level = options.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if sparse:  # STRICT_NANS, which would forbid sparse tactics again, stays unset
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    add_profiles(builder, config, options.profiles)
    use_timing_cache(config, folder / options.timing_cache)
    built = builder.build_serialized_network(network, config)
    stop.raise_again()
    if monitor.interrupted:
        raise KeyboardInterrupt
    if built is None:
        raise PlanError(f"TensorRT built nothing: {' '.join(log.errors) or 'it gives no reason'}")
    keep_timing_cache(config, folder / options.timing_cache)
    engine = trt.Runtime(log).deserialize_cuda_engine(memoryview(built))
    if engine is None:
        raise PlanError(f"TensorRT cannot read what it built: {' '.join(log.errors)}")
    inspector = engine.create_engine_inspector()
    described = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    weight_bytes = engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)
    replace(plan, memoryview(built))
    warnings = tuple(dict.fromkeys(log.warnings))
    return Engine(plan, built.nbytes, weight_bytes, tuple(log.sparsity), warnings, tuple(described.get("Layers", ())))


def parse(parser: trt.OnnxParser, onnx: Path) -> None:
    """Read the ONNX file; its weights are found beside it."""
    if parser.parse_from_file(str(onnx)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    told = [f"node {e.node()} {e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors]
    raise PlanError(f"TensorRT cannot read {onnx.name}: {'; '.join(told) or 'it gives no reason'}")


def allow_decomposition(network: trt.INetworkDefinition) -> None:
    """Let attention run as several kernels where TensorRT has no fused one for it; otherwise the build would fail."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # get_layer knows the base class only
            layer.attention.decomposable = True


def add_profiles(
    builder: trt.Builder,
    config: trt.IBuilderConfig,
    profiles: Mapping[str, Mapping[str, Sequence[Sequence[int]]]],
) -> None:
    """The ranges of shapes that the engine is built for, in the order of the options."""
    for name, shapes in profiles.items():
        profile = builder.create_optimization_profile()
        for tensor, (least, typical, most) in shapes.items():
            profile.set_shape(tensor, trt.Dims(least), trt.Dims(typical), trt.Dims(most))
        if config.add_optimization_profile(profile) < 0:
            raise PlanError(f"TensorRT refuses the {name} profile {json.dumps(shapes)}")


def use_timing_cache(config: trt.IBuilderConfig, file: Path) -> None:
    """Start from what an earlier build timed on this GPU; a cache from elsewhere is not used."""
    kept = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(kept), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def keep_timing_cache(config: trt.IBuilderConfig, file: Path) -> None:
    """Write what was timed, for the next build."""
    cache = config.get_timing_cache()
    if cache is not None:
        replace(file, memoryview(cache.serialize()))


def replace(file: Path, content: memoryview) -> None:
    """Write beside ``file`` and rename, so that it is whole or not there."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PlanError(f"cannot write {file}: {error.strerror}") from error


def verdict(name: str, plugin: str, engine: Engine) -> dict[str, Any]:
    """Whether a linear got a sparse tactic: ``yes``, ``no``, ``unknown``, or ``plugin``, and what that is told from.

    A line of the log names the layers that got one. Where it does not help, the tactic of the layer that holds the
    linear does, as the inspector describes it, unless that is a fused node whose tactic names no matrix product.
    """
    own = [layer for layer in engine.layers if isinstance(layer, dict) and named(name, _text(layer))]
    layer = max(own, key=lambda own: bool(PRODUCT.search(_tactic(own))), default={})
    told: dict[str, Any] = {
        "layer": str(layer.get("Name", "")),
        "tactic": _tactic(layer),
        "has_sparse_weights": layer.get("HasSparseWeights"),
    }
    if plugin:
        return {**told, "picked": "plugin", "why": f"the plugin {plugin} runs it"}
    picked, eligible = (_lines(engine.log, words) for words in ("picked sparse implementation", "eligible for sparse"))
    if any(named(name, line) for line in picked):
        return {**told, "picked": "yes", "why": "the log says so"}
    if SPARSE.search(told["tactic"]):
        return {**told, "picked": "yes", "why": "the tactic is a sparse one"}
    if picked and any(named(name, line) for line in eligible):
        return {**told, "picked": "no", "why": "eligible, but a dense tactic was faster"}
    if not own:
        return {**told, "picked": "unknown", "why": "no layer of the engine names it"}
    if not PRODUCT.search(told["tactic"]):
        return {**told, "picked": "unknown", "why": "inside a fused node"}
    return {**told, "picked": "no", "why": "the tactic is a dense one"}


def named(name: str, text: str) -> bool:
    """Whether a text names a layer, and not one whose name only begins or ends like it."""
    return re.search(rf"(?<!\w)(?<!\w\.){re.escape(name)}(?!(?!_myl)\w|\.\w)", text) is not None


def _text(layer: Mapping[str, Any]) -> str:
    return f"{layer.get('Name', '')} {layer.get('Metadata', '')}"


def _tactic(layer: Mapping[str, Any]) -> str:
    return str(layer.get("TacticName", ""))


def _lines(log: Sequence[str], words: str) -> list[str]:
    return [line for line in log if words in line]


def summary(found: Mapping[str, Any]) -> list[str]:
    """What was found out, in a few lines."""
    linears = found["linears"]
    able = [linear for linear in linears if linear["pattern"] == "2:4" and linear["eligible"] != "no"]
    counts = {word: sum(linear["picked"] == word for linear in able) for word in ("yes", "no", "unknown")}
    lines = [
        f"{found['plan']}: {found['plan_bytes'] / 1e6:.1f} MB, weights {found['weight_bytes'] / 1e6:.1f} MB, built by "
        f"TensorRT {found['tensorrt']}"
    ]
    if found["dense_plan"]:
        lines.append(
            f"{found['dense_plan']}, without sparse tactics: {found['dense_plan_bytes'] / 1e6:.1f} MB, weights "
            f"{found['dense_weight_bytes'] / 1e6:.1f} MB"
        )
    lines.append(
        f"sparse tactics: {counts['yes']} of {len(able)} eligible 2:4 linears, {counts['no']} dense, "
        f"{counts['unknown']} unknown, of {len(linears)} linears in all"
    )
    if plugged := sum(linear["picked"] == "plugin" for linear in linears):
        lines.append(f"plugin: {plugged} linears; keep {LIBRARY} beside {found['plan']} to run it")
    for linear in able:
        if linear["picked"] != "yes":
            lines.append(f"  {linear['name']}: {linear['picked']}, {linear['why']}")
    return lines + [f"TensorRT warns: {warning}" for warning in found["warnings"]]


def read_options(file: Path) -> Options:
    """The options in a file that sparsify-export wrote."""
    try:
        return Options(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise PlanError(f"{file} does not hold the options of an engine: {error}") from error


def main(argv: Sequence[str]) -> int:
    """The script: build what the options name, print what was found out and write it beside the engine."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser("build_plan.py", description="Build a TensorRT engine from what lies beside this.")
    parser.add_argument("options", nargs="*", type=Path, help="the .trt.json file; default the one beside this script")
    parser.add_argument("--plugins", type=Path, default=here / LIBRARY, help="library of plugins; default beside this")
    given = parser.parse_args(argv)
    files = given.options or sorted(here.glob("*.trt.json"))
    if len(files) != 1:
        sys.stderr.write(f"build_plan.py: want one file of options, e.g. model.trt.json; got {len(files)}\n")
        return 2
    try:
        options, folder = read_options(files[0]), files[0].resolve().parent
        found = _with_progress(lambda show: build(options, folder, show=show, library=given.plugins))
    except PlanError as error:
        sys.stderr.write(f"build_plan.py: {error}\n")
        return NOT_BUILT
    text = json.dumps(found, indent=1) + "\n"
    files[0].with_name(f"{found['plan']}.layers.json").write_text(text, encoding="utf-8")
    sys.stdout.write("\n".join(summary(found)) + "\n")
    return 0


def _with_progress(work: Callable[[Show], dict[str, Any]]) -> dict[str, Any]:
    """Run ``work`` with a progress bar, or with a line for every phase where rich is missing."""
    if importlib.util.find_spec("rich") is None:
        return work(lambda stage, done, total: None if done else sys.stdout.write(f"{stage}\n"))
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        return work(show)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
