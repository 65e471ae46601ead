"""What a model is calibrated and verified on: windows of text, or batches from files."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .passes.errors import InputError
from .passes.frontend.batches import (
    TOKENS_PER_BATCH,
    Batch,
    Texts,
    padded_batches,
    read_npz,
    read_texts,
    read_windows,
    token_batches,
    written_by_itself,
)
from .passes.frontend.kv_cache import empty_past
from .passes.frontend.load import Pretrained
from .passes.frontend.npz import load_npz
from .passes.frontend.positions import bears_padding, longest, windows_of
from .passes.frontend.trace import Traced
from .passes.recipe import Recipe
from .runtime.embedding import pooling_of
from .runtime.published import DECODED
from .settings import Console, Settings
from .stages import Stages

HELD_OUT = 48
"""Tokens of the text that the finished file is verified on."""

PADDED = ((17, 10), (23, 14, 5))
"""And of two and of three texts at once."""

PARTS = 4
"""Where rates are learned, a step takes such a part of the tokens that one takes elsewhere, as a short window is."""

CUT = (1.0, 0.8, 0.5)
"""How much of a piece of sound one, two and three samples have; the model was seen to take half, see ``open_axis``."""

CROSSED = 640
"""Tokens of a text at most that is made to cross a sliding window, whatever the model."""

LOGITS = CROSSED << 18
PRODUCTS = 1 << 38
"""Longer windows are crossed by models small enough: numbers in the logits (today's vocabularies with ``CROSSED``
tokens), and products of weights in a run at most. A run is made some ten times, in float64 too."""


def calibration_text(
    pretrained: Pretrained, settings: Settings, stages: Stages, console: Console
) -> tuple[Tensor | Texts | None, Tensor | None]:
    """Calibration windows and held-out tokens, or None where the model or the settings want none.

    An encoder reads texts one by one, as it will be given them, where it can be told which tokens are padding: as many
    as fill the windows.

    Raises:
        InputError: the model does not take text, or has no tokenizer to read it with.
    """
    wanted = settings.calibration
    if settings.recipe is None or wanted.inputs is not None:
        return None, None
    if not pretrained.takes_text_alone:
        what = "takes more than text" if pretrained.inputs[0] == "input_ids" else "does not take text"
        raise InputError(f"{pretrained.source} {what}; give --calibration-inputs FOLDER")
    limit = longest(pretrained.model)
    with stages.run("calibration text"):
        if wanted.text == "self":
            length = _shortened(wanted.length or 512, limit, "the model takes", console)
            samples = wanted.windows(length, 32)
            windows = written_by_itself(
                pretrained,
                samples=samples + 1,
                length=length,
                seed=wanted.seed,
                bos=settings.bos,
                progress=console.progress,
            )
        else:
            if pretrained.tokenizer is None:
                raise InputError(f"{pretrained.source} has no tokenizer, so it cannot read {wanted.text}")
            length = _shortened(wanted.length or 2048, limit, "the model takes", console)
            words = pretrained.tokenizer
            if pretrained.kind == "encoder" and "attention_mask" in pretrained.inputs:
                cut = pooling_of(Path(pretrained.source)).length
                length = _shortened(length, cut, "the folder says that a text has", console)
                samples = wanted.windows(length, 128)
                return _texts(Path(wanted.text), words, samples, length, bos=settings.bos, console=console)
            samples = wanted.windows(length, 128)
            windows = read_windows(Path(wanted.text), words, samples=samples + 1, length=length, bos=settings.bos)
            _shortened(length, windows.shape[1], "the text holds", console)
            if len(windows) < samples:
                console.note(f"calibrating on {len(windows)} windows; the text does not hold {samples}")
    if len(windows) > samples:
        return windows[:samples], windows[samples:]
    return windows, None


def _texts(
    path: Path, words: Any, samples: int, length: int, *, bos: bool, console: Console
) -> tuple[Texts, Tensor | None]:
    """Texts that fill so many windows, and the one behind them."""
    found = read_texts(path, words, tokens=samples * length + 1, length=length, bos=bos)
    if not found.tokens:
        raise InputError(f"{path} holds no token; calibration needs some")
    if found.tokens <= samples * length:
        console.note(f"calibrating on {found.tokens} tokens in {len(found)} texts; that is what {path} holds")
        return found, None
    if len(found) == 1:
        return found, None
    return Texts(found.ids[:-1], found.types[:-1]), torch.tensor([found.ids[-1]])


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


def batches_for(
    traced: Traced, pretrained: Pretrained, settings: Settings, windows: Tensor | Texts | None
) -> list[Batch]:
    """The calibration batches: the user's own, or windows of text; none where nothing is pruned."""
    if settings.calibration.inputs is not None:
        return read_npz(settings.calibration.inputs, traced, samples=settings.calibration.samples)
    if windows is None:
        return []
    assert settings.recipe is not None
    return text_batches(traced, pretrained, settings.recipe, windows)


def text_batches(traced: Traced, pretrained: Pretrained, recipe: Recipe, windows: Tensor | Texts) -> list[Batch]:
    """Calibration windows in batches of the size that the recipe learns from: a step takes a whole batch at least."""
    tokens = TOKENS_PER_BATCH
    learns = [each.tokens_per_step for each in (recipe.tune, recipe.distil) if each is not None]
    if learns:
        tokens = min(learns)
    if recipe.allocation is not None:
        tokens = 1 if isinstance(windows, Tensor) else tokens // PARTS  # a window each
    if isinstance(windows, Texts):
        padding = pretrained.model.config.get_text_config().pad_token_id or 0
        return padded_batches(traced, windows, names=pretrained.inputs, padding=padding, tokens_per_batch=tokens)
    return token_batches(traced, windows, names=pretrained.inputs, tokens_per_batch=tokens)


def probes_of(
    traced: Traced, pretrained: Pretrained, batches: list[Batch], held_out: Tensor | None, settings: Settings
) -> list[Batch]:
    """The inputs that the finished file is verified on: one, two and three samples, texts padded.

    They come from the held-out text, else from the last batch, else they are random. A decoder's texts are shorter by
    what it writes itself, and there is one more of them for each sliding window that it crosses; none of them is padded
    where padding would change what the model says of a text.
    """
    generator = torch.Generator().manual_seed(settings.calibration.seed)
    if traced.inputs[0] != "input_ids":
        return _other_probes(traced, batches, generator)
    if traced.sample:
        return _mixed_probes(traced, pretrained, batches, generator)
    limit = longest(pretrained.model)
    longer = min(limit or CROSSED, CROSSED)
    if held_out is None:
        vocabulary = pretrained.model.config.get_text_config().vocab_size
        held_out = torch.randint(0, vocabulary, (1, longer), generator=generator)
    written = DECODED if traced.kind == "causal" else 0
    crossed = [(window - written // 2,) for window in crossings(pretrained)[0]]
    lengths = [(HELD_OUT - written,), *PADDED, *(crossed if written else ())]
    most = max([longer, *(length + written for (length,) in crossed)])
    if written and not bears_padding(pretrained.model):
        lengths = [texts[:1] * len(texts) for texts in lengths]
    return [_padded(traced, pretrained, held_out[0], texts, min(limit or most, most) - written) for texts in lengths]


def crossings(pretrained: Pretrained) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sliding windows of a decoder that verification crosses, and those that would take too long.

    A window that is as long as the texts that the model takes is no boundary.
    """
    if pretrained.kind != "causal":
        return (), ()
    model = pretrained.model
    limit = longest(model)
    own = [size for size in windows_of(model) if limit is None or size + DECODED <= limit]
    vocabulary = model.config.get_text_config().vocab_size
    weights = sum(parameter.numel() for parameter in model.parameters())

    def cheap(size: int) -> bool:
        longer = size + DECODED
        return longer <= CROSSED or (longer * vocabulary <= LOGITS and longer * weights <= PRODUCTS)

    return tuple(filter(cheap, own)), tuple(size for size in own if not cheap(size))


def _padded(traced: Traced, pretrained: Pretrained, tokens: Tensor, lengths: tuple[int, ...], limit: int) -> Batch:
    """Texts of some lengths, each from another place; padding in front of a decoder's texts, behind an encoder's."""
    padding = getattr(pretrained.model.config.get_text_config(), "pad_token_id", None) or 0
    lengths = tuple(max(1, min(length, limit)) for length in lengths)
    ids = torch.full((len(lengths), max(lengths)), padding)
    mask = torch.zeros_like(ids)
    tokens = tokens.repeat(-(-ids.shape[1] // len(tokens)) + 1)
    for row, length in enumerate(lengths):
        own = slice(-length, None) if traced.kind == "causal" else slice(length)
        # A padding token inside a text would be padding to models that find it by its number.
        ids[row, own] = _without(tokens.roll(-5 * row)[:length], padding)
        mask[row, own] = 1
    known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    past = [x for pair in empty_past(traced.cache, len(ids), pretrained.model.dtype) for x in pair]
    own_inputs = [known[name] for name in pretrained.inputs if name in known]
    return Batch((*own_inputs, *past), mask.bool() if "attention_mask" in pretrained.inputs else None, len(past))


def _without(tokens: Tensor, padding: int) -> Tensor:
    return torch.where(tokens == padding, (padding + 1) if padding == 0 else (padding - 1), tokens)


def _mixed_probes(
    traced: Traced, pretrained: Pretrained, batches: list[Batch], generator: torch.Generator
) -> list[Batch]:
    """One, two and three samples of text with pictures or sound: the user's, or texts of random tokens and noise."""
    if batches:
        return [_rows(batches[-1], torch.arange(count) % len(batches[-1].inputs[0])) for count in (1, 2, 3)]
    vocabulary = pretrained.model.config.get_text_config().vocab_size
    limit = min(longest(pretrained.model) or HELD_OUT, HELD_OUT)
    tokens = torch.randint(0, vocabulary, (limit,), generator=generator)
    made = []
    for lengths in ((HELD_OUT,), *PADDED):
        text = _padded(traced, pretrained, tokens, lengths, limit)
        noise = torch.randn(len(lengths), *traced.sample, generator=generator)
        made.append(Batch((*text.inputs, noise), text.token_mask))
    return made


def _rows(batch: Batch, rows: Tensor) -> Batch:
    mask = None if batch.token_mask is None else batch.token_mask[rows]
    return Batch(tuple(x[rows] for x in batch.inputs), mask, batch.cached)


def _other_probes(traced: Traced, batches: list[Batch], generator: torch.Generator) -> list[Batch]:
    """One, two and three pictures or pieces of sound; the latter of another length each, where that is open."""
    given = batches[-1] if batches else Batch((torch.randn(3, *traced.sample, generator=generator),), None)
    chosen = [torch.arange(count) % len(given.inputs[0]) for count in (1, 2, 3)]
    probes = []
    for rows, part in zip(chosen, CUT, strict=True):
        own = [x[rows] for x in given.inputs]
        if (axis := traced.open_axis) is not None:
            own = [x.narrow(axis, 0, math.ceil(part * x.shape[axis])) for x in own]
        probes.append(Batch(tuple(own), None, given.cached))
    return probes
