"""The compiler: a pretrained model in, a verified sparse ONNX model and its report out."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .alternatives import compare
from .budget import Choice
from .budgeted import Subject, choose_and_prune
from .calibration_data import batches_for, calibration_text, crossings, example_for, probes_of
from .dense_checkpoint import DenseCheckpoint
from .engine import Pruned, finish_engine
from .evaluation import evaluate_onnx, evaluate_torch
from .genai_folder import write_genai
from .objective import output_of
from .onnx_in import compile_onnx
from .passes.checkpoint import Checkpoint
from .passes.dialect.packed import Packed
from .passes.errors import InputError
from .passes.frontend.load import load
from .passes.frontend.positions import bears_padding, longest
from .passes.frontend.trace import Traced, trace
from .passes.fx.canonical import canonicalise, parameter_names
from .passes.fx.embeddings import quantise_embeddings, stored_tables
from .passes.fx.experts import find_stacks
from .passes.fx.linears import find_linears
from .passes.fx.partition import Partition, partition
from .passes.fx.rewrite import lower_linears, stored_weights
from .passes.lower import to_onnx
from .passes.mapped import mapped
from .passes.recipe import Recipe, Timings
from .passes.sparsify import Sparsified, sparsify
from .passes.tables import Table
from .plan import engine_sizes
from .report import Evaluation, Report, build_report
from .runtime.artifact import CONTEXT
from .runtime.benchmark import compare_kernels
from .runtime.evaluate import Perplexity
from .runtime.inspection import LEFT_DENSE
from .runtime.machine import this_machine
from .runtime.published import ask, put_weights
from .runtime.session import SPARSE_OPS
from .runtime.verify import expect, verify
from .settings import SILENT, Console, Settings, plain
from .stages import Stages
from .target import Target, inputs_of


def compile_model(
    source: str,
    out: str,
    settings: Settings,
    *,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    checkpoint: Path | None = None,
    also: tuple[Path, Literal["fp32", "bf16"]] | None = None,
    console: Console = SILENT,
) -> Report:
    """Compile ``source`` to ``out``.

    Args:
        source: Hugging Face folder, hub id, ``.gguf`` file or ``.onnx`` file; the last goes to ``compile_onnx``.
        out: a file ending in ``.onnx`` (weights go to ``OUT.HASH.data``, the report to ``OUT.report.json``), an engine
            ending in ``.plan`` (see engine.py), or a folder for ``model.onnx``, its weights, tokenizer,
            configuration and ``report.json``.
        settings: what to make.
        trust_remote_code: run Python code that comes with the checkpoint.
        overwrite: replace what is at ``out``.
        checkpoint: folder for what pruning has done so far, see ``sparsify``; whoever calls may then remove it.
        also: a folder that the same weights are written to as a dense checkpoint of transformers, and their type.
        console: where to tell what happens.

    Returns:
        The report that was written.

    Raises:
        InputError: bad input; nothing was written.
        VerificationError: a fold or the finished file differs from the model; a finished file is kept as
            ``OUT.failed``.
    """
    if source.endswith(".onnx"):
        if checkpoint is not None:
            raise InputError(f"--checkpoint {checkpoint} has no meaning for an .onnx file, which is pruned in one step")
        if also is not None:
            raise InputError(
                f"--also-checkpoint {also[0]} has no meaning for an .onnx file, of which transformers knows no class"
            )
        return compile_onnx(
            source, out, settings, trust_remote_code=trust_remote_code, overwrite=overwrite, console=console
        )
    if checkpoint is not None:
        Checkpoint.check(checkpoint)
    given = inputs_of(source, settings, checkpoint)
    target = Target.check(out, overwrite=overwrite, inputs=given)
    if also is not None:
        target = replace(target, also=DenseCheckpoint.check(*also, out=target.out, inputs=given))
    with target.guarded():
        return _compile(
            source, target, settings, trust_remote_code=trust_remote_code, checkpoint=checkpoint, console=console
        )


def _compile(
    source: str,
    target: Target,
    settings: Settings,
    *,
    trust_remote_code: bool,
    checkpoint: Path | None,
    console: Console,
) -> Report:
    stages, timings = Stages(), Timings()
    with stages.run("load"):
        console.progress("loading", 0, 0)
        pretrained = load(source, trust_remote_code=trust_remote_code)
    for text in pretrained.notes:
        console.note(text)
    sizes = engine_sizes(settings.engine, pretrained) if settings.engine else None
    before = evaluate_torch(pretrained, settings, stages, console)
    uncrossed = crossings(pretrained)[1]
    for size in uncrossed:
        console.note(f"verification does not cross the sliding window of {size} tokens: that would take too long")
    windows, held_out = calibration_text(pretrained, settings, stages, console)
    with stages.run("trace"):
        console.progress("tracing", 0, 0)
        example = example_for(settings)
        # The profile of an engine has lengths for text only.
        traced = trace(pretrained, example, any_length=settings.engine is None)
        if traced.size:
            console.note(traced.size)
        if traced.kind == "causal" and not bears_padding(pretrained.model):
            console.note("padding in front of a text changes what the model says of it, so give it texts of one length")
        turned = canonicalise(traced.program)
        _check_experts(traced, settings)
        parts = partition(traced.program)
    batches = batches_for(traced, pretrained, settings, windows)
    params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
    done = Sparsified((), (), {}, {})
    choice: Choice | None = None
    if settings.recipe is not None:
        model = Subject(
            pretrained,
            traced,
            parts,
            params,
            batches,
            output_of(traced, pretrained),
            lambda: trace(pretrained, example),
        )
        perplexity = before[0] if before else None
        choice, done = _prune(model, settings, perplexity, target, checkpoint, stages, timings, console)
        del model
        store(traced, params)
    probes = probes_of(traced, pretrained, batches, held_out, settings)
    if sizes is not None:
        pruned = Pruned(pretrained, parts, params, batches, done, probes, turned, example)
        return finish_engine(pruned, target, settings, sizes, before, stages, timings, console)
    with stages.run("lower"):
        console.progress("lowering", 0, 0)
        put_weights(pretrained.model, params, turned)  # or the dense ones would take their disk to the end
        machine = this_machine() if settings.lower_for is not None else None
        worth = machine.worth(settings.storage, tokens=settings.lower_for or 1) if machine else None
        sparse = settings.ops == "sparse"
        lowered = lower_linears(
            traced.program,
            storage=settings.storage,
            sparse=sparse,
            worth=worth,
            on_grid=done.on_grid,
            patterns=done.patterns,
            forms=done.forms,
            unpruned=_unpruned(traced, done),
        )
        packed = stored_weights(traced.program, lowered)
        storages = {key: done.forms[key].storage if key in done.forms else settings.storage for key in packed}
        rounded = {key: its.activations for key, its in storages.items()}
        coded = settings.storage.quantised or any(its.quantised for its in storages.values())
        embeddings = quantise_embeddings(traced.program) if coded else []
        stored = as_stored(params, {**packed, **stored_tables(traced.program, embeddings)})
        put_weights(pretrained.model, stored, turned)
        published = [ask(pretrained.model, traced, probe) for probe in probes]
        expected = expect(parts, stored, published, rounded)
        del params, packed, stored, published
        target.open()
        reasons = {entry.linear.path: entry.reason for entry in lowered if entry.reason}
        metadata: dict[str, object] = {"source": source, "settings": plain(settings), LEFT_DENSE: reasons}
        if traced.inputs[0] == "input_ids":
            metadata[CONTEXT] = longest(pretrained.model)
        to_onnx(traced, target.model, metadata=metadata, in_place=settings.cache == "in-place")
    with stages.run("verify"):
        console.progress("verifying", 0, 0)
        verified = verify(target.model, traced, expected)
    with stages.run("measure"):
        console.progress("measuring", 0, 0)
        latency = compare_kernels(target.model) if any(entry.op in SPARSE_OPS for entry in lowered) else ()
    after = evaluate_onnx(pretrained, target.model, settings, stages, console)
    report = build_report(
        source=source,
        settings=plain(settings),
        blocks=done.blocks,
        lowered=lowered,
        embeddings=embeddings,
        verified=verified,
        evaluation=Evaluation(*before, *after) if before and after else None,
        latency=latency,
        stages=stages.done,
        machine=machine.key if machine else None,
        pruning_seconds=timings.seconds,
        distilled=done.distilled,
        model=target.model,
        uncrossed=uncrossed,
        choice=choice.plain() if choice else None,
    )
    if settings.alternatives:
        with stages.run("alternatives"):
            compared = compare(
                pretrained,
                target.model,
                after[0].perplexity if after else None,
                settings,
                choice,
                partial(compile_model, source, trust_remote_code=trust_remote_code),
                console,
            )
        report = replace(report, alternatives=compared.plain(), stages=tuple(stages.done))
    if target.folder:
        report = replace(report, genai=write_genai(pretrained, target.model))
    target.finish(pretrained, report)
    return report


def _check_experts(traced: Traced, settings: Settings) -> None:
    """What cannot be done with experts yet is refused before anything is pruned.

    Raises:
        InputError: an engine or a budget is wanted of a model with experts.
    """
    if not find_stacks(traced.program.graph_module.graph):
        return
    if settings.engine is not None:
        raise InputError("this model has experts, which TensorRT's parser has no op for; give -o a name in .onnx")
    if settings.alternatives:
        raise InputError("this model has experts, of which --alternatives knows no other form; leave it out")
    if settings.budget is not None:
        raise InputError(
            "this model has experts, and what one of them takes in time and quality depends on how often it is chosen, "
            "which a budget does not count; give --nm or --sparsity instead"
        )


def _prune(
    model: Subject,
    settings: Settings,
    before: Perplexity | None,
    target: Target,
    checkpoint: Path | None,
    stages: Stages,
    timings: Timings,
    console: Console,
) -> tuple[Choice | None, Sparsified]:
    """Prune to the recipe, or to what a budget makes of it."""

    def prune(recipe: Recipe) -> Sparsified:
        with stages.run("prune"):
            return sparsify(
                model.parts,
                model.params,
                recipe,
                model.batches,
                output=model.output,
                cache=cache_pairs(model.traced, model.parts),
                progress=console.progress,
                note=console.note,
                timings=timings,
                checkpoint=checkpoint,
            )

    assert settings.recipe is not None
    if settings.budget is None:
        return None, prune(settings.recipe)
    return choose_and_prune(model, settings, before, target, prune, stages, console)


def _unpruned(traced: Traced, done: Sparsified) -> dict[str, str]:
    """Why linears were not pruned, by path; nothing where nothing was to be pruned."""
    if not done.blocks:
        return {}
    program = traced.program
    paths = [linear.path for linear in find_linears(program.graph_module.graph, parameter_names(program))]
    inside = {linear.path: linear.reason for block in done.blocks for linear in block.linears}
    return {path: why for path in paths if (why := inside.get(path, "outside the repeated layers"))}


def cache_pairs(traced: Traced, parts: Partition) -> list[tuple[str, str]]:
    """Graph names of every past input and the present output that continues it."""
    inputs = dict(zip(traced.inputs, parts.inputs, strict=True))
    outputs = dict(zip(traced.outputs, parts.outputs, strict=True))
    pasts = [name for name in traced.inputs if name.startswith("past_key_values.")]
    return [(inputs[name], outputs[name.replace("past_key_values.", "present.")]) for name in pasts]


def store(traced: Traced, params: Mapping[str, Tensor]) -> None:
    """Put the pruned weights into the program, so that the dense ones can be freed."""
    state = traced.program.state_dict
    for key in state:
        if state[key] is not params[key]:
            state[key] = torch.nn.Parameter(params[key], requires_grad=False)


def as_stored(params: Mapping[str, Tensor], packed: Mapping[str, Packed | Table]) -> dict[str, Tensor]:
    """The weights as the file holds them: those that were packed, unpacked again."""
    return {key: mapped(packed[key].unpack()) if key in packed else value for key, value in params.items()}
