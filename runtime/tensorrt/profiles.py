"""The ranges of shapes that an engine is built for: one profile for prompts, one for decoding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import onnx

from ...passes.errors import InputError

Range: TypeAlias = tuple[int, int, int]
"""Smallest, typical and largest size of an axis."""

Profiles: TypeAlias = dict[str, dict[str, list[list[int]]]]
"""For every profile its inputs, each with its smallest, typical and largest shape."""

CONTEXT = 2048
"""Tokens in a context where the model takes more and nothing is asked for."""

PIECES = 4
"""In so many a prompt as long as the context is read, where nothing is asked for. A profile gives each input a range of
its own, so at most S tokens are read after at most context - S: with S the context, none could follow a past."""


@dataclass(frozen=True)
class Sizes:
    """What an engine has to take.

    Attributes:
        batch: texts, or images, at once.
        sequence: tokens of a prompt at once.
        context: tokens of a text at most, prompt and answer together.
    """

    batch: Range
    sequence: Range
    context: int


def parse_range(flag: str, text: str) -> Range:
    """``min,opt,max`` as numbers.

    Raises:
        InputError: they are not three numbers from 1 up in that order.
    """
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"{flag} {text} is not a range; want three numbers min,opt,max, e.g. 1,8,32")
    least, typical, most = map(int, parts)
    if not 1 <= least <= typical <= most:
        raise InputError(f"{flag} {text} contradicts itself; want 1 <= min <= opt <= max")
    return least, typical, most


def choose_sizes(
    batch: str | None, sequence: str | None, context: int | None, *, longest: int | None, cached: bool
) -> Sizes:
    """Fill in what was not given, and refuse what cannot be.

    Args:
        batch: ``--batch``; default 1,1,1.
        sequence: ``--seq``; default 1 to the context, with a cache to a quarter of it; typically 128.
        context: ``--context``; default what the model takes, up to ``CONTEXT``.
        longest: tokens that the model takes; None where it does not say.
        cached: whether the model has a KV cache, so that longer prompts can be read in pieces.

    Raises:
        InputError: a range contradicts itself or the context, or the context is longer than the model's.
    """
    if context is not None and longest is not None and context > longest:
        raise InputError(f"--context {context} is longer than the {longest} tokens that the model takes")
    context = context or min(longest or CONTEXT, CONTEXT)
    if context < 2:
        raise InputError(f"--context {context} is too small; want 2 or more")
    most = max(1, context // PIECES) if cached else context
    tokens = parse_range("--seq", sequence) if sequence else (1, min(128, most), most)
    if tokens[2] > context:
        raise InputError(f"--seq {sequence} asks for {tokens[2]} tokens at once, more than the context of {context}")
    return Sizes(parse_range("--batch", batch) if batch else (1, 1, 1), tokens, context)


def profiles_for(path: Path, sizes: Sizes) -> Profiles:
    """The profiles of an ONNX file that this tool wrote, from the names of its inputs' axes.

    A decoder gets two: ``prefill`` takes prompts, up to S tokens after a past of up to context - S, none typically, and
    ``decode`` one token after any past. At every corner past and tokens add up to the mask, or TensorRT would try
    shapes that contradict each other. Longer prompts are read in pieces (``pieces``).
    """
    inputs = onnx.load(str(path), load_external_data=False).graph.input
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in inputs
    }
    batch, tokens, context = sizes.batch, sizes.sequence, sizes.context
    prefill = {
        "batch_size": batch,
        "sequence_length": tokens,
        "past_sequence_length": (0, 0, context - tokens[2]),
        "total_sequence_length": (tokens[0], tokens[1], context),
    }
    if not any(name.startswith("past_key_values.") for name in shapes):
        return {"all": _at(shapes, prefill)}
    half = max(1, context // 2)
    decode = {
        "batch_size": batch,
        "sequence_length": (1, 1, 1),
        "past_sequence_length": (1, half, context - 1),
        "total_sequence_length": (2, half + 1, context),
    }
    return {"prefill": _at(shapes, prefill), "decode": _at(shapes, decode)}


def pieces(past: int, tokens: int, *, most: int, most_past: int) -> list[int]:
    """In which pieces a profile takes tokens after a past.

    What is left over by whole pieces comes first, so that the last one follows at most context - ``most``. A few tokens
    near the end of the context are read one by one, by the profile for decoding.

    Args:
        past: tokens in the cache.
        tokens: tokens to read.
        most: tokens that the profile takes at once.
        most_past: tokens in the cache after which it does.
    """
    if tokens > most:
        rest = tokens % most
        return [rest] * (rest > 0) + [most] * (tokens // most)
    return [tokens] if past <= most_past else [1] * tokens


def _at(shapes: Mapping[str, Sequence[str | int]], axes: Mapping[str, Range]) -> dict[str, list[list[int]]]:
    """Every input with its three shapes."""
    return {
        name: [[axis if isinstance(axis, int) else axes[axis][place] for axis in shape] for place in range(3)]
        for name, shape in shapes.items()
    }
