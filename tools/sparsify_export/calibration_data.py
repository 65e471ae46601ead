"""What a model is calibrated and verified on: windows of text, or batches from files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

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
from .passes.frontend.load import Pretrained
from .passes.frontend.trace import Traced
from .passes.recipe import Recipe
from .settings import Console, Settings
from .stages import Stages

HELD_OUT = 48
"""Tokens of the text that the finished file is verified on."""


def calibration_text(
    pretrained: Pretrained, settings: Settings, stages: Stages, console: Console
) -> tuple[Tensor | None, Tensor | None]:
    """Calibration windows and held-out tokens, or None where the model or the settings want none.

    Raises:
        InputError: the model does not take text, or has no tokenizer to read it with.
    """
    wanted = settings.calibration
    if settings.recipe is None or wanted.inputs is not None:
        return None, None
    if pretrained.inputs[0] != "input_ids":
        raise InputError(f"{pretrained.source} does not take text; give --calibration-inputs FOLDER")
    limit = longest(pretrained)
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


def longest(pretrained: Pretrained) -> int | None:
    """Tokens of a text at most, as the configuration says; None where it says nothing."""
    return getattr(pretrained.model.config, "max_position_embeddings", None)


def _shortened(length: int, limit: int | None, why: str, console: Console) -> int:
    if limit is not None and length > limit:
        console.note(f"windows shortened from {length} to {limit} tokens: that is what {why}")
        return limit
    return length


def example_for(settings: Settings) -> Mapping[str, Tensor] | None:
    """The first of the user's batches, which a model that does not take text is traced with."""
    folder = settings.calibration.inputs
    if folder is None:
        return None
    files = sorted(folder.glob("*.npz"))
    return load_npz(files[0]) if files else None


def batches_for(traced: Traced, pretrained: Pretrained, settings: Settings, windows: Tensor | None) -> list[Batch]:
    """The calibration batches: the user's own, or windows of text; none where nothing is pruned."""
    if settings.calibration.inputs is not None:
        return read_npz(settings.calibration.inputs, traced, samples=settings.calibration.samples)
    if windows is None:
        return []
    assert settings.recipe is not None
    return text_batches(traced, pretrained, settings.recipe, windows)


def text_batches(traced: Traced, pretrained: Pretrained, recipe: Recipe, windows: Tensor) -> list[Batch]:
    """Calibration windows in batches of the size that the recipe learns from: a step takes a whole batch at least."""
    tokens = TOKENS_PER_BATCH
    learns = [each.tokens_per_step for each in (recipe.tune, recipe.distil) if each is not None]
    if learns:
        tokens = min(learns)
    if recipe.allocation is not None:
        tokens = 1  # a window each
    return token_batches(traced, windows, names=pretrained.inputs, tokens_per_batch=tokens)


def probe_of(
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
