"""Inputs for an ONNX model that nobody told us about: from ``.npz`` files, or made up from the shapes it declares."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ..passes.errors import InputError
from ..passes.frontend.npz import load_npz

Feed: TypeAlias = dict[str, Any]
"""Arrays by input name."""

LENGTH = 16
"""How long an axis is made that the model leaves open; a picture's sides are longer, see ``SIDES``."""
SOUND = {2: 16_000, 3: 200}
"""How long an open axis is made where a model's one input is sound: samples ``[batch, time]``, or spectra: a second of
the former, two of the latter, which models cut into windows of up to 400 samples or 32 spectra first."""
SIDES = (224, 48, 32, 64, 96, 256)
"""How long a picture's open sides are made: those that many models take, tried in this order."""
LARGEST = 1 << 30
"""How many numbers an input is made up of at most."""
NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def read_feeds(folder: Path, session: Any, sizes: Mapping[str, int], *, samples: int | None) -> list[Feed]:
    """Read one feed from every ``.npz`` file, arrays named like the model's inputs; a KV cache may be left out.

    Args:
        folder: where the files are; they are taken in the order of their names.
        session: an ONNX Runtime session of the model.
        sizes: what is known about open axes, by their names.
        samples: how many files at most; None for all.

    Returns:
        Arrays in the types that the model wants.

    Raises:
        InputError: there is no such file, or one lacks an input or does not fit it.
    """
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise InputError(f"{folder} holds no .npz file; want one a batch, with arrays named like the model's inputs")
    feeds = []
    for file in files[:samples]:
        arrays = {name: tensor.numpy() for name, tensor in load_npz(file).items()}
        feed: Feed = {}
        for value in session.get_inputs():
            if value.name in arrays:
                feed[value.name] = arrays[value.name].astype(_dtype(value))
            elif any(_is_past(dim) for dim in value.shape):
                batch = len(next(iter(arrays.values()))) if arrays else 1
                feed[value.name] = np.zeros(_shape(value, batch, sizes), _dtype(value))
            else:
                raise InputError(f"{file} lacks {value.name}; it holds {', '.join(arrays) or 'nothing'}")
        feeds.append(feed)
    return feeds


def fixed_length(session: Any) -> int | None:
    """The tokens of a text where the model takes no other number; None where it takes any."""
    shapes = [value.shape for value in session.get_inputs() if value.name == "input_ids" and len(value.shape) == 2]
    return next((shape[1] for shape in shapes if isinstance(shape[1], int)), None)


def text_feeds(windows: NDArray[np.int64], session: Any, sizes: Mapping[str, int], *, tokens: int) -> list[Feed]:
    """Windows of text as feeds: tokens, a mask of ones, positions from 0, one sentence a text; a KV cache is empty.

    Args:
        windows: ``[windows, length]`` token ids.
        session: an ONNX Runtime session of the model.
        sizes: what is known about open axes, by their names.
        tokens: how many run at once; more costs memory, fewer costs time.

    Raises:
        InputError: the model takes something else than text.
    """
    inputs = session.get_inputs()
    batch = next((value.shape[0] for value in inputs if value.name == "input_ids"), None)
    if batch is None:
        raise InputError("the model takes no input_ids, so it takes no text; give --calibration-inputs FOLDER")
    fixed = isinstance(batch, int)
    if fixed and batch > len(windows):
        raise InputError(f"the model takes {batch} texts at once, and there are {len(windows)}; give more text")
    rows = batch if fixed else max(1, tokens // windows.shape[1])
    feeds = []
    for begin in range(0, len(windows) - (rows - 1 if fixed else 0), rows):
        ids = windows[begin : begin + rows]
        known = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
            "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
        }
        feed: Feed = {}
        for value in inputs:
            if value.name in known:
                feed[value.name] = known[value.name].astype(_dtype(value))
            elif any(_is_past(dim) for dim in value.shape):
                feed[value.name] = np.zeros(_shape(value, len(ids), sizes), _dtype(value))
            else:
                raise InputError(f"input {value.name} is no text; give --calibration-inputs FOLDER")
        feeds.append(feed)
    return feeds


def make_feed(
    session: Any,
    bounds: Mapping[str, int],
    sizes: Mapping[str, int],
    *,
    seed: int,
    length: int | None = None,
    side: int = SIDES[0],
) -> Feed:
    """Make up one batch of one sample.

    Floats are normal random numbers. Integers that choose rows of a table are random rows of it; others are ones,
    which for a mask means that everything counts. An axis called ``past...`` is empty, a batch holds one sample, other
    open axes hold ``length`` entries.

    Args:
        session: an ONNX Runtime session of the model.
        bounds: for inputs that index a table, how many rows it has.
        sizes: what is known about open axes, by their names.
        seed: of the random numbers.
        length: of open axes; None: ``side`` for those of a picture, what ``SOUND`` says for those of sound, and
            ``LENGTH`` for all others.
        side: how long the open sides of pictures are.

    Raises:
        InputError: an input is of a type that cannot be made up.
    """
    rng = np.random.default_rng(seed)
    feed: Feed = {}
    values = session.get_inputs()
    if length is None and len(values) == 1 and values[0].type.startswith("tensor(float"):
        length = SOUND.get(len(values[0].shape))
    for value in values:
        shape, dtype = _shape(value, 1, sizes, length, side), _dtype(value)
        if math.prod(shape) > LARGEST:
            raise InputError(f"input {value.name} has the shape {list(shape)}; want at most {LARGEST} numbers")
        if np.issubdtype(dtype, np.floating):
            feed[value.name] = rng.standard_normal(shape).astype(dtype)
        elif value.name in bounds:
            feed[value.name] = rng.integers(0, bounds[value.name], shape).astype(dtype)
        else:
            feed[value.name] = np.ones(shape, dtype)
    return feed


def make_feed_that_runs(session: Any, bounds: Mapping[str, int], sizes: Mapping[str, int], *, seed: int) -> Feed:
    """As ``make_feed``, with the first of ``SIDES`` that the model runs on.

    Raises:
        InputError: it runs on none of them; what is said is of the first.
    """
    source = "inputs made up from its shapes; give --calibration-inputs FOLDER"
    feed = make_feed(session, bounds, sizes, seed=seed)
    try:
        try_feed(session, feed, source)
    except InputError:
        shapes = {name: x.shape for name, x in feed.items()}
        for side in SIDES[1:]:
            other = make_feed(session, bounds, sizes, seed=seed, side=side)
            if {name: x.shape for name, x in other.items()} == shapes:
                break  # no side is open
            try:
                try_feed(session, other, source)
            except InputError:
                continue
            return other
        raise
    return feed


def switched(session: Any, feed: Feed) -> list[Feed]:
    """The same feed with every switch (an input that is one bool) the other way, one switch at a time."""
    bools = [value.name for value in session.get_inputs() if value.type == "tensor(bool)"]
    return [feed | {name: ~feed[name]} for name in bools if feed[name].size == 1]


def zeroed_masks(feed: Feed) -> list[Feed]:
    """The same feed with zeros where ``make_feed`` put ones, if it did: some masks mark padding and not tokens."""
    masks = [name for name, x in feed.items() if x.dtype.kind in "iu" and x.size > 1 and bool((x == 1).all())]
    return [feed | {name: np.zeros_like(feed[name]) for name in masks}] if masks else []


def try_feed(session: Any, feed: Feed, source: str) -> None:
    """Run the given model once, so that what cannot run is refused before any work is done.

    Raises:
        InputError: ONNX Runtime cannot run the model on these inputs.
    """
    try:
        options = ort.RunOptions()
        options.log_severity_level = 4  # what is wrong arrives as an exception; on the terminal it stands once
        session.run(None, feed, options)
    except Exception as error:  # its exceptions have no common base class of their own
        said = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
        raise InputError(f"cannot run the model on {source}: {said}") from error


def _dtype(value: Any) -> Any:
    if value.type not in NUMPY:
        raise InputError(f"input {value.name} is a {value.type}, which cannot be fed; want numbers")
    return NUMPY[value.type]


def _shape(
    value: Any, batch: int, sizes: Mapping[str, int], length: int | None = None, side: int = SIDES[0]
) -> tuple[int, ...]:
    picture = len(value.shape) == 4 and value.type.startswith("tensor(float") and not any(map(_is_past, value.shape))
    size = length or (side if picture else LENGTH)
    return tuple(sizes.get(dim) or _size(dim, batch, axis, size) for axis, dim in enumerate(value.shape))


def _size(dim: int | str | None, batch: int, axis: int, open_size: int) -> int:
    """``past_sequence_length + 1`` is 1: the parts of a sum are sized one by one."""
    if isinstance(dim, int):
        return dim
    if dim is None or "batch" in dim.lower():
        return batch if axis == 0 or dim is not None else open_size
    parts = [part.strip() for part in dim.split("+")]
    if parts == [dim] and axis == 0 and not _is_past(dim):
        return batch
    return sum(int(p) if re.fullmatch(r"\d+", p) else 0 if _is_past(p) else open_size for p in parts)


def _is_past(dim: int | str | None) -> bool:
    return isinstance(dim, str) and "past" in dim.lower() and "+" not in dim
