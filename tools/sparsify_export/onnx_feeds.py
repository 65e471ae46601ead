"""The inputs that an ``.onnx`` file is calibrated, verified and timed on: the user's own, or made up."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .passes.errors import InputError
from .passes.frontend.batches import TOKENS_PER_BATCH, read_windows
from .passes.frontend.load import tokenizer_beside
from .passes.onnx.index_inputs import head_sizes, index_bounds
from .passes.onnx.linears import Linear
from .passes.onnx.view import Model
from .runtime import library_path
from .runtime.child import Job, kills
from .runtime.feeds import (
    Feed,
    fixed_length,
    make_feed_that_runs,
    read_feeds,
    switched,
    text_feeds,
    try_feed,
    zeroed_masks,
)
from .runtime.session import open_session
from .settings import Console, Settings

SAMPLES, LENGTH = 128, 512
"""Windows of text to calibrate on, and the tokens of each, where nobody and no input of the model says how many."""
VERIFIED = 4
"""On how many of the given feeds the result is compared."""


def looks(settings: Settings) -> bool:
    """Whether something was given that shows what linears read."""
    return settings.calibration.inputs is not None or settings.calibration.text != "self"


def feeds_of(
    model: Model, linears: Sequence[Linear], settings: Settings, console: Console
) -> tuple[list[Feed], list[Feed]]:
    """What the model is calibrated on; and what it is verified on, of which the first is what it is timed on.

    It is run to know that it can be.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if death := kills(Job(str(model.path.resolve()), str(library_path()), optimise=True), Path(scratch)):
            raise InputError(f"cannot open {model.path}: {death}")
    session = open_session(model.path)
    folder = settings.calibration.inputs
    if folder is not None:
        feeds = read_feeds(folder, session, head_sizes(model, linears), samples=settings.calibration.samples)
        try_feed(session, feeds[0], f"the first batch of {folder}")
        return feeds, [*feeds[:VERIFIED], *_others(session, feeds[0], made_up=False)]
    if settings.calibration.text != "self":
        return _text_feeds(model, head_sizes(model, linears), session, settings, console)
    bounds, sizes = index_bounds(model), head_sizes(model, linears)
    feed = make_feed_that_runs(session, bounds, sizes, seed=settings.calibration.seed)
    return [feed], [feed, *_others(session, feed, made_up=True)]


def _text_feeds(
    model: Model, sizes: Mapping[str, int], session: Any, settings: Settings, console: Console
) -> tuple[list[Feed], list[Feed]]:
    """Windows of the user's text, by the tokenizer beside the model: all to calibrate on, the first to verify on."""
    wanted = settings.calibration
    words = tokenizer_beside(model.path.parent)
    length = wanted.length or fixed_length(session) or LENGTH
    samples = wanted.windows(length, SAMPLES)
    windows = read_windows(Path(wanted.text), words, samples=samples, length=length, bos=settings.bos).numpy()
    if len(windows) < samples:
        console.note(f"calibrating on {len(windows)} windows; the text does not hold {samples}")
    feeds = text_feeds(windows, session, sizes, tokens=TOKENS_PER_BATCH)
    checked = text_feeds(windows[: VERIFIED * len(feeds[0]["input_ids"])], session, sizes, tokens=1)[:VERIFIED]
    try_feed(session, feeds[0], f"windows of {length} tokens of {wanted.text}")
    return feeds, [*checked, *_others(session, checked[0], made_up=False)]


def _others(session: Any, feed: Feed, *, made_up: bool) -> list[Feed]:
    """The feed with switches the other way, and with zeros for ones, as far as the given model takes that.

    Both branches are to be right; and a mask may mean the opposite of what was made up.
    """
    others = []
    for other in [*switched(session, feed), *(zeroed_masks(feed) if made_up else [])]:
        try:
            try_feed(session, other, "")
        except InputError:  # not a legal input of this model, or not with the others: nothing to compare
            continue
        others.append(other)
    return others
