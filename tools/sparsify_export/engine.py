"""The end of a compilation to a TensorRT engine: ONNX for TensorRT, verified; then the engine, or what builds it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibrate.eight_bit import Kind
from .calibrate.patterns import NM, Pattern
from .calibration_data import crossings
from .evaluation import evaluate_onnx
from .passes.activations import Scaled, scale_activations
from .passes.frontend.batches import Batch
from .passes.frontend.load import Pretrained
from .passes.frontend.retrace import retrace
from .passes.frontend.trace import Traced
from .passes.fx.partition import Partition, partition
from .passes.fx.products import Turned
from .passes.fx.rewrite import Lowered, lower_linears
from .passes.lower import to_onnx
from .passes.onnx.plugin import LIBRARY
from .passes.onnx.qdq import Codes, quantise_weights
from .passes.recipe import Timings
from .passes.sparsify import Sparsified
from .plan import Ops
from .report import Evaluation, Report, build_report
from .runtime import tensorrt
from .runtime.artifact import CONTEXT
from .runtime.benchmark import Row, compare_plans
from .runtime.evaluate import Perplexity
from .runtime.exact import ExactAnswers
from .runtime.published import ask, put_weights
from .runtime.tensorrt.linears import PlanLinear, plan_linears
from .runtime.tensorrt.profiles import Sizes, profiles_for
from .runtime.tensorrt.session import why_not
from .runtime.tensorrt.twin import wants_twin, write_twin
from .runtime.verify import expect, verify
from .settings import Console, Settings, plain
from .stages import Stages
from .target import SCRIPT, Target

LOWERED = "a plain MatMul, for TensorRT to choose a tactic"
QUANTISED = "a MatMul of {} codes between Q and DQ, for TensorRT to choose a tactic"


@dataclass(frozen=True)
class Pruned:
    """A model whose weights are final.

    Attributes:
        pretrained: the model; its own weights are cast.
        parts: what was pruned.
        params: the weights by their key in the traced program.
        batches: what pruning was calibrated on.
        done: what pruning reported.
        probes: what the result is verified on.
        turned: see ``canonicalise``.
        example: see ``trace``.
    """

    pretrained: Pretrained
    parts: Partition
    params: Mapping[str, Tensor]
    batches: Sequence[Batch]
    done: Sparsified
    probes: Sequence[Batch]
    turned: Mapping[str, Turned]
    example: Mapping[str, Tensor] | None


def finish_engine(
    pruned: Pruned,
    target: Target,
    settings: Settings,
    sizes: Sizes,
    before: tuple[Perplexity, ExactAnswers] | None,
    stages: Stages,
    timings: Timings,
    console: Console,
) -> Report:
    """Write ``OUT.trt.onnx``, ``OUT.trt.json``, ``build_plan.py``, and the engine where it can be built.

    The ONNX file is verified in ONNX Runtime before anything is built from it.

    Raises:
        InputError: the model does not fit the dtype, TensorRT does not take it, or the files cannot be written.
        VerificationError: the ONNX file differs from the model.
    """
    assert settings.engine is not None
    dtype = settings.storage.dtype
    scaled = _scaled(pruned, settings.engine.codes, stages, console)
    with stages.run("lower"):
        console.progress("lowering", 0, 0)
        traced = retrace(pruned.pretrained, pruned.params, dtype, pruned.example)
        quantised = _quantised(traced, pruned, settings.engine.codes, scaled)
        params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
        rounded = {key: codes.activations for key, codes in quantised.items()}
        put_weights(pruned.pretrained.model, params, pruned.turned)
        probes = [_in_dtype(probe, dtype) for probe in pruned.probes]
        asked = [ask(pruned.pretrained.model, traced, _in_dtype(probe, torch.float32)) for probe in probes]
        published = [replace(told, batch=_in_dtype(told.batch, dtype)) for told in asked]
        expected = expect(partition(traced.program), params, published, rounded)
        del params
        entries = lower_linears(
            traced.program,
            storage=settings.storage,
            worth=partial(_worth, settings.engine.ops),
            patterns=pruned.done.patterns,
        )
        lowered = [_entry(entry, dtype, quantised.get(entry.linear.weight)) for entry in entries]
        target.open()
        metadata: dict[str, object] = {"source": pruned.pretrained.source, "settings": plain(settings)}
        if traced.kind == "causal":
            metadata[CONTEXT] = sizes.context
        to_onnx(traced, target.model, metadata=metadata, tensorrt=True, quantised=quantised)
    linears = plan_linears(target.model)
    plugins = any(linear.plugin for linear in linears)
    runnable = target.model
    if wants_twin(target.model):
        runnable = target.stage / "twin.onnx"
        write_twin(target.model, runnable)
    with stages.run("verify"):
        console.progress("verifying", 0, 0)
        verified = verify(runnable, traced, expected, ways=_ways(dtype, plugins=plugins))
    after = evaluate_onnx(pruned.pretrained, runnable, settings, stages, console)
    if runnable != target.model:
        for file in (runnable, runnable.with_name(f"{runnable.name}.data")):
            file.unlink(missing_ok=True)
    _tell(linears, dtype, console)
    found, latency = _build(target, pruned, settings, sizes, linears, stages, console)
    report = build_report(
        source=pruned.pretrained.source,
        settings=plain(settings),
        blocks=pruned.done.blocks,
        lowered=lowered,
        embeddings=(),
        verified=verified,
        evaluation=Evaluation(*before, *after) if before and after else None,
        latency=latency,
        stages=stages.done,
        machine=None,
        pruning_seconds=timings.seconds,
        distilled=pruned.done.distilled,
        model=target.model,
        uncrossed=crossings(pruned.pretrained)[1],
    )
    report = replace(report, engine=found)
    target.finish(pruned.pretrained, report)
    return report


def _scaled(pruned: Pruned, kind: Kind | None, stages: Stages, console: Console) -> list[Scaled]:
    """The scales of what pruned linears read, where their products are to be of codes."""
    if kind is None:
        return []
    with stages.run("scale activations"):
        return scale_activations(
            pruned.parts,
            pruned.params,
            pruned.batches,
            paths={x.path for block in pruned.done.blocks for x in block.linears if x.pattern is not None},
            kind=kind,
            progress=console.progress,
        )


def _quantised(traced: Traced, pruned: Pruned, kind: Kind | None, scaled: Sequence[Scaled]) -> dict[str, Codes]:
    """The codes of the linears that were scaled; their weights become the values of these."""
    if kind is None:
        return {}
    state, quantised = traced.program.state_dict, quantise_weights(pruned.params, scaled, kind, pruned.done.on_grid)
    for key, codes in quantised.items():
        state[key] = torch.nn.Parameter(codes.value(pruned.params[key].detach()), requires_grad=False)
    return quantised


def _worth(ops: Ops | None, pattern: Pattern, rows: int, columns: int, nonzeros: int) -> str:
    """Why a weight stays a MatMul, or "" for one of our plugins; see ``Worth``.

    That is what ``--ops`` asks for. By default 2:4 is left to TensorRT's own sparse tactics, and only zeros without a
    pattern, for which it has no kernel, get the plugin.
    """
    if ops == "standard":
        return "--ops standard"
    plugged = not isinstance(pattern, NM) or (ops == "sparse" and pattern == NM(2, 4))
    return "" if plugged else LOWERED


def _entry(entry: Lowered, dtype: torch.dtype, codes: Codes | None) -> Lowered:
    """What the report says of a linear: its bytes in the engine's dtype, or those of its codes and their scales."""
    if not entry.reason:
        return entry
    weights = entry.linear.out_features * entry.linear.in_features
    if codes is not None:
        return replace(entry, reason=QUANTISED.format(codes.kind), stored_bytes=weights + codes.scales.nbytes)
    return replace(entry, stored_bytes=weights * dtype.itemsize)


def _ways(dtype: torch.dtype, *, plugins: bool) -> dict[str, bool]:
    """What the ways of verifying the file are called, and whether each is with our kernels."""
    how = "ONNX Runtime, a float32 twin" if dtype == torch.bfloat16 else "ONNX Runtime"
    if not plugins:
        return {how: False}
    return {f"{how}, plugins as our CPU kernels": True, f"{how}, plugins as functions": False}


def _in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    return replace(batch, inputs=tuple(x.to(dtype) if x.is_floating_point() else x for x in batch.inputs))


def _tell(linears: Sequence[PlanLinear], dtype: torch.dtype, console: Console) -> None:
    """Say beforehand which zeros cannot help."""
    sparse = [linear for linear in linears if linear.pattern == "2:4" and not linear.plugin]
    if sparse and dtype == torch.float32:
        console.note("2:4 tensor cores need 16 bits or less, so this fp32 engine will run dense; give --dtype fp16")
    elif odd := [linear for linear in sparse if linear.eligible == "no"]:
        console.note(f"{len(odd)} of {len(sparse)} 2:4 linears will run dense: {odd[0].name}, {odd[0].reason}")
    if coded := sum(linear.bits == 8 for linear in linears):
        console.note(
            f"{coded} products are of 8-bit codes between Q and DQ, which TensorRT may run dense whatever their "
            "pattern (NVIDIA/TensorRT#4694); the report of a built engine says what it picked"
        )
    if plugged := sum(linear.plugin != "" for linear in linears):
        console.note(f"{plugged} linears are run by the plugins in {LIBRARY}, which building and running need")


def _build(
    target: Target,
    pruned: Pruned,
    settings: Settings,
    sizes: Sizes,
    linears: Sequence[PlanLinear],
    stages: Stages,
    console: Console,
) -> tuple[dict[str, Any], tuple[Row, ...]]:
    """Write options and script beside the ONNX file, and build the engine with them where that is possible.

    Returns:
        What is known about the engine, for the report, and what was timed.
    """
    assert settings.engine is not None
    cache = f"{target.out.stem}.timing.cache"
    options = {
        "onnx": target.model.name,
        "plan": target.out.name,
        "profiles": profiles_for(target.model, sizes),
        "linears": [asdict(linear) for linear in linears],
        "sparse": any(linear.eligible != "no" for linear in linears),
        "workspace_mib": settings.engine.workspace_mib,
        "timing_cache": cache,
        "source": pruned.pretrained.source,
        "level": settings.engine.level or 3,
    }
    file = target.stage / f"{target.out.stem}.trt.json"
    file.write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(Path(tensorrt.__file__).with_name(SCRIPT), target.stage / SCRIPT)
    library = _library(target) if any(linear.plugin for linear in linears) else None
    why, found = why_not(run=False), {}
    latency: tuple[Row, ...] = ()
    if not why:
        from .runtime.tensorrt.build_plan import PlanError, build, read_options

        if (target.out.parent / cache).is_file():
            shutil.copyfile(target.out.parent / cache, target.stage / cache)
        try:
            with stages.run("build"):
                found = build(read_options(file), target.stage, show=console.progress, library=library)
        except PlanError as error:
            why = str(error)
            (target.stage / target.out.name).unlink(missing_ok=True)  # one of the two engines may have been built
    for warning in found.get("warnings", ()):
        console.note(f"TensorRT warns: {warning}")
    if found and found["dense_plan"] and not why_not(run=True):
        with stages.run("measure"):
            latency = compare_plans(target.stage / found["plan"], target.stage / found["dense_plan"])
    return {"not_built": why, "options": file.name, **options, **found}, latency


def _library(target: Target) -> Path:
    """The library of our plugins: this installation's, which is put beside the engine, else the one that is there."""
    own = Path(__file__).with_name(LIBRARY)
    if not own.is_file():
        return target.out.parent / LIBRARY
    return Path(shutil.copyfile(own, target.stage / LIBRARY))
