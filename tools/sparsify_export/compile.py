"""The compiler: a pretrained model in, a verified sparse ONNX model and its report out."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .calibrate.patterns import NM, Pattern, Unstructured
from .calibrate.update import DAMPING
from .passes.dialect.packed import Packed
from .passes.dialect.storage import FP32, Storage
from .passes.distil import Output
from .passes.errors import InputError
from .passes.frontend.batches import (
    TOKENS_PER_BATCH,
    Batch,
    load_npz,
    read_npz,
    read_windows,
    token_batches,
    written_by_itself,
)
from .passes.frontend.load import Pretrained, load
from .passes.frontend.trace import Traced, trace
from .passes.fx.canonical import canonicalise
from .passes.fx.partition import Partition, partition
from .passes.fx.rewrite import lower_linears, stored_weights
from .passes.lower import to_onnx
from .passes.recipe import Recipe, Timings, Tune
from .passes.sparsify import Sparsified, sparsify
from .plan import EngineSettings, engine_sizes
from .report import Evaluation, Report, build_report
from .runtime.benchmark import compare_kernels
from .runtime.evaluate import Logits, Perplexity, onnx_logits, perplexity, torch_logits
from .runtime.exact import ExactAnswers, exact_answers
from .runtime.machine import this_machine
from .runtime.session import CausalSession, open_session
from .runtime.verify import expect, verify
from .stages import Stages
from .target import Target

HELD_OUT = 48
"""Tokens of the text that the finished file is verified on."""


@dataclass(frozen=True)
class Calibration:
    """What the activations are observed on.

    Attributes:
        text: ``self``, or a text file; not used when ``inputs`` is given.
        inputs: folder of ``.npz`` batches.
        samples: how many windows; None for 128 of a file, 32 of the model's own text, every ``.npz`` batch.
        length: tokens in a window; None for 2,048 of a file, 512 of the model's own text.
        seed: of the model's own text, and of the tokens that verify the file.
    """

    text: str = "self"
    inputs: Path | None = None
    samples: int | None = None
    length: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out; printed before work starts and stored in the file and the report.

    Attributes:
        recipe: how to prune, or None to prune nothing.
        calibration: what to observe.
        storage: of packed weights.
        ops: ``sparse`` lowers sparse weights to our ops; ``standard`` writes plain MatMul with zeros.
        lower_for: leave a weight dense where this machine would run it slower sparse, in calls of so many tokens;
            None lowers every weight that gets smaller.
        evaluate: text file to measure perplexity on before and after, or None.
        window: tokens in an evaluation window.
        windows: how many evaluation windows at most; None for all.
        engine: what a TensorRT engine has to take; None where none is asked for.
    """

    recipe: Recipe | None
    calibration: Calibration = Calibration()
    storage: Storage = FP32
    ops: Literal["sparse", "standard"] = "sparse"
    lower_for: int | None = None
    evaluate: Path | None = None
    window: int = 2048
    windows: int | None = None
    engine: EngineSettings | None = None


@dataclass(frozen=True)
class Console:
    """Where the compiler tells what it does; the default says nothing."""

    note: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None


def compile_model(
    source: str,
    out: str,
    settings: Settings,
    *,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    checkpoint: Path | None = None,
    console: Console = Console(),
) -> Report:
    """Compile ``source`` to ``out``.

    Args:
        source: Hugging Face folder, hub id, ``.gguf`` file or ``.onnx`` file; the last goes to ``compile_onnx``.
        out: a file ending in ``.onnx`` (weights go to ``OUT.data``, the report to ``OUT.report.json``), an engine
            ending in ``.plan`` (see engine.py), or a folder for ``model.onnx``, ``model.onnx.data``, tokenizer,
            configuration and ``report.json``.
        settings: what to make.
        trust_remote_code: run Python code that comes with the checkpoint.
        overwrite: replace what is at ``out``.
        checkpoint: folder for what pruning has done so far, see ``sparsify``; whoever calls may then remove it.
        console: where to tell what happens.

    Returns:
        The report that was written.

    Raises:
        InputError: bad input; nothing was written.
        VerificationError: a fold or the finished file differs from the model; a finished file is kept as
            ``OUT.failed``.
    """
    if source.endswith(".onnx"):
        from .onnx_in import compile_onnx  # which imports this file

        if checkpoint is not None:
            raise InputError(f"--checkpoint {checkpoint} has no meaning for an .onnx file, which is pruned in one step")
        return compile_onnx(
            source, out, settings, trust_remote_code=trust_remote_code, overwrite=overwrite, console=console
        )
    target = Target.check(out, overwrite=overwrite)
    stages, timings = Stages(), Timings()
    with stages.run("load"):
        console.progress("loading", 0, 0)
        pretrained = load(source, trust_remote_code=trust_remote_code)
    sizes = engine_sizes(settings.engine, pretrained) if settings.engine else None
    before = _evaluate_torch(pretrained, settings, stages, console)
    windows, held_out = _text(pretrained, settings, stages, console)
    with stages.run("trace"):
        console.progress("tracing", 0, 0)
        example = _example(settings)
        traced = trace(pretrained, example)
        canonicalise(traced.program)
        parts = partition(traced.program)
    batches = _batches(traced, pretrained, settings, windows)
    params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
    done = Sparsified((), (), {})
    if settings.recipe is not None:
        with stages.run("prune"):
            done = sparsify(
                parts,
                params,
                settings.recipe,
                batches,
                output=output_of(traced),
                cache=cache_pairs(traced, parts),
                progress=console.progress,
                note=console.note,
                timings=timings,
                checkpoint=checkpoint,
            )
        store(traced, params)
    probe = _probe(traced, pretrained, batches, held_out, settings)
    if sizes is not None:
        from .engine import Pruned, finish_engine  # which imports this file

        pruned = Pruned(pretrained, parts, params, batches, done, probe, example)
        return finish_engine(pruned, target, settings, sizes, before, stages, timings, console)
    with stages.run("lower"):
        console.progress("lowering", 0, 0)
        machine = this_machine() if settings.lower_for is not None else None
        worth = machine.worth(settings.storage, tokens=settings.lower_for or 1) if machine else None
        sparse = settings.ops == "sparse"
        lowered = lower_linears(
            traced.program, storage=settings.storage, sparse=sparse, worth=worth, on_grid=done.on_grid
        )
        packed = stored_weights(traced.program, lowered)
        rounded = dict.fromkeys(packed, settings.storage.activations)
        expected = expect(parts, as_stored(params, packed), probe, rounded)
        del params, packed
        target.open()
        with target.guarded():
            to_onnx(traced, target.model, metadata={"source": source, "settings": plain(settings)})
    with target.guarded():
        with stages.run("verify"):
            console.progress("verifying", 0, 0)
            verified = verify(target.model, traced, expected)
        with stages.run("measure"):
            console.progress("measuring", 0, 0)
            latency = compare_kernels(target.model) if any(not entry.reason for entry in lowered) else ()
        after = evaluate_onnx(pretrained, target.model, settings, stages, console)
        report = build_report(
            source=source,
            settings=plain(settings),
            blocks=done.blocks,
            lowered=lowered,
            verified=verified,
            evaluation=Evaluation(*before, *after) if before and after else None,
            latency=latency,
            stages=stages.done,
            machine=machine.key if machine else None,
            pruning_seconds=timings.seconds,
            distilled=done.distilled,
            model=target.model,
        )
        target.finish(pretrained, report)
    return report


def parse_pattern(nm: str | None, sparsity: float | None) -> Pattern | None:
    """The pattern that ``--nm`` or ``--sparsity`` names, or None with neither.

    Raises:
        InputError: both are given, or one is out of range.
    """
    if nm is not None and sparsity is not None:
        raise InputError(f"--nm {nm} and --sparsity {sparsity:g} were both given; want at most one of them")
    try:
        return NM.parse(nm) if nm is not None else Unstructured(sparsity) if sparsity is not None else None
    except ValueError as error:
        raise InputError(str(error)) from error


def _text(
    pretrained: Pretrained, settings: Settings, stages: Stages, console: Console
) -> tuple[Tensor | None, Tensor | None]:
    """Calibration windows and held-out tokens, or None where the model or the settings want none."""
    wanted = settings.calibration
    if settings.recipe is None or wanted.inputs is not None:
        return None, None
    if pretrained.inputs[0] != "input_ids":
        raise InputError(f"{pretrained.source} does not take text; give --calibration-inputs FOLDER")
    limit = _longest(pretrained)
    with stages.run("calibration text"):
        if wanted.text == "self":
            samples, length = wanted.samples or 32, wanted.length or 512
            length = _shortened(length, limit, "the model takes", console)
            windows = written_by_itself(
                pretrained, samples=samples + 1, length=length, seed=wanted.seed, progress=console.progress
            )
        else:
            if pretrained.tokenizer is None:
                raise InputError(f"{pretrained.source} has no tokenizer, so it cannot read {wanted.text}")
            samples, length = wanted.samples or 128, wanted.length or 2048
            length = _shortened(length, limit, "the model takes", console)
            windows = read_windows(Path(wanted.text), pretrained.tokenizer, samples=samples + 1, length=length)
            _shortened(length, windows.shape[1], "the text holds", console)
            if len(windows) < samples:
                console.note(f"calibrating on {len(windows)} windows; the text does not hold {samples}")
    if len(windows) > samples:
        return windows[:samples], windows[samples:]
    return windows, None


def _longest(pretrained: Pretrained) -> int | None:
    return getattr(pretrained.model.config, "max_position_embeddings", None)


def _shortened(length: int, limit: int | None, why: str, console: Console) -> int:
    if limit is not None and length > limit:
        console.note(f"windows shortened from {length} to {limit} tokens: that is what {why}")
        return limit
    return length


def _example(settings: Settings) -> Mapping[str, Tensor] | None:
    folder = settings.calibration.inputs
    if folder is None:
        return None
    files = sorted(folder.glob("*.npz"))
    return load_npz(files[0]) if files else None


def _batches(traced: Traced, pretrained: Pretrained, settings: Settings, windows: Tensor | None) -> list[Batch]:
    if settings.calibration.inputs is not None:
        return read_npz(settings.calibration.inputs, traced, samples=settings.calibration.samples)
    if windows is None:
        return []
    assert settings.recipe is not None
    return text_batches(traced, pretrained, settings.recipe, windows)


def text_batches(traced: Traced, pretrained: Pretrained, recipe: Recipe, windows: Tensor) -> list[Batch]:
    """Calibration windows in batches of the size that the recipe learns from: a step takes a whole batch at least."""
    tokens = TOKENS_PER_BATCH
    if recipe.tune is not None or recipe.distil is not None:
        tokens = Tune.tokens_per_step if recipe.tune is None else recipe.tune.tokens_per_step
    if recipe.allocation is not None:
        tokens = 1  # a window each
    return token_batches(traced, windows, names=pretrained.inputs, tokens_per_batch=tokens)


def _probe(
    traced: Traced, pretrained: Pretrained, batches: list[Batch], held_out: Tensor | None, settings: Settings
) -> Batch:
    """The inputs that the finished file is verified on: held-out text, else the last batch, else random tokens."""
    if held_out is None and batches and traced.inputs[0] != "input_ids":
        return batches[-1].head()
    generator = torch.Generator().manual_seed(settings.calibration.seed)
    if traced.inputs[0] != "input_ids":
        shape = next(n.meta["val"].shape for n in traced.program.graph.nodes if n.name == _user_inputs(traced)[0])
        return Batch((torch.randn(1, *[int(s) for s in shape[1:]], generator=generator),), None)
    if held_out is None:
        vocabulary = pretrained.model.config.get_text_config().vocab_size
        held_out = torch.randint(0, vocabulary, (1, HELD_OUT), generator=generator)
    return token_batches(traced, held_out[:1, :HELD_OUT], names=pretrained.inputs)[0]


def _user_inputs(traced: Traced) -> list[str]:
    specs = traced.program.graph_signature.input_specs
    return [spec.arg.name for spec in specs if spec.kind.name == "USER_INPUT"]


def cache_pairs(traced: Traced, parts: Partition) -> list[tuple[str, str]]:
    """Graph names of every past input and the present output that continues it."""
    inputs = dict(zip(traced.inputs, parts.inputs, strict=True))
    outputs = dict(zip(traced.outputs, parts.outputs, strict=True))
    pasts = [name for name in traced.inputs if name.startswith("past_key_values.")]
    return [(inputs[name], outputs[name.replace("past_key_values.", "present.")]) for name in pasts]


def output_of(traced: Traced) -> Output:
    """What the model returns first."""
    return "logits" if traced.kind == "causal" else "values"


def store(traced: Traced, params: Mapping[str, Tensor]) -> None:
    """Put the pruned weights into the program, so that the dense ones can be freed."""
    state = traced.program.state_dict
    for key in state:
        if state[key] is not params[key]:
            state[key] = torch.nn.Parameter(params[key], requires_grad=False)


def as_stored(params: Mapping[str, Tensor], packed: Mapping[str, Packed]) -> dict[str, Tensor]:
    """The weights as the file holds them: those that were packed, unpacked again."""
    return {key: packed[key].unpack() if key in packed else value for key, value in params.items()}


def _evaluate_torch(
    pretrained: Pretrained, settings: Settings, stages: Stages, console: Console
) -> tuple[Perplexity, ExactAnswers] | None:
    if settings.evaluate is None:
        return None
    if pretrained.kind != "causal" or pretrained.tokenizer is None:
        raise InputError(f"{pretrained.source} is not a language model with a tokenizer, so --eval has no meaning")
    with stages.run("evaluate dense"):
        console.progress("evaluating the dense model", 0, 0)
        return _evaluate(torch_logits(pretrained.model), pretrained, settings)


def evaluate_onnx(
    pretrained: Pretrained, model: Path, settings: Settings, stages: Stages, console: Console
) -> tuple[Perplexity, ExactAnswers] | None:
    """Perplexity and exact answers of a finished file, or None without ``--eval``."""
    if settings.evaluate is None:
        return None
    with stages.run("evaluate result"):
        console.progress("evaluating the result", 0, 0)
        return _evaluate(onnx_logits(CausalSession(open_session(model))), pretrained, settings)


def _evaluate(logits: Logits, pretrained: Pretrained, settings: Settings) -> tuple[Perplexity, ExactAnswers]:
    """What ``--eval`` asks for, of the dense model and of the result alike."""
    assert settings.evaluate is not None
    limit = _longest(pretrained)
    length = min(settings.window, limit or settings.window)
    windows = read_windows(settings.evaluate, pretrained.tokenizer, samples=settings.windows, length=length)
    return perplexity(logits, windows), exact_answers(logits, pretrained.tokenizer, limit=limit)


def _damping(recipe: Recipe) -> float | None:
    if recipe.update == "none" or recipe.damping is not None:
        return recipe.damping
    return DAMPING[recipe.update]


def _quantiser(settings: Settings) -> str | None:
    """How weights are quantised: as the recipe says, else to nearest where they are packed."""
    if settings.recipe and settings.recipe.quantise:
        return settings.recipe.quantise.method
    return "rtn" if settings.storage.quantised and settings.ops == "sparse" else None


def plain(settings: Settings) -> dict[str, Any]:
    """The settings as JSON-able values."""
    recipe = settings.recipe
    return {
        "pattern": str(recipe.pattern) if recipe else None,
        "score": recipe.score if recipe else None,
        "ria_power": recipe.ria_power if recipe else None,
        "permute": recipe.permute if recipe else None,
        "skip": list(recipe.skip) if recipe else [],
        "mask": str(recipe.given.file) if recipe and recipe.given else None,
        "allocation": asdict(recipe.allocation) if recipe and recipe.allocation else None,
        "update": recipe.update if recipe else None,
        "mask_from": recipe.mask_from if recipe and recipe.update != "none" else None,
        "hessian": recipe.hessian if recipe and recipe.update != "none" else None,
        "damping": _damping(recipe) if recipe else None,
        "tune": recipe.tune.scope if recipe and recipe.tune else None,
        "tune_epochs": recipe.tune.epochs if recipe and recipe.tune else None,
        "tune_lr": recipe.tune.rate if recipe and recipe.tune else None,
        "distil": recipe.distil.epochs if recipe and recipe.distil else None,
        "distil_lr": recipe.distil.rate if recipe and recipe.distil else None,
        "quantise": _quantiser(settings),
        "calibration": str(settings.calibration.inputs or settings.calibration.text),
        "samples": settings.calibration.samples,
        "seq_len": settings.calibration.length,
        "seed": settings.calibration.seed,
        "dtype": settings.storage.kind,
        "group": settings.storage.group or None,
        "ops": settings.ops if settings.engine is None else "what TensorRT takes",
        "lower": "always" if settings.lower_for is None else f"auto, for {settings.lower_for} tokens a call",
        **(settings.engine.plain() if settings.engine else {}),
    }
