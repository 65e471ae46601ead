"""What a model that takes no text takes: the shape of its input, and whether sound may be of any length."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import InputError
from .load import Pretrained

SAMPLES = 16_000
"""A second of sound, as its samples."""
FRAMES = 200
"""Two seconds of sound, as spectra a hundredth of a second apart."""
BANDS = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel")
"""Where a configuration says how many numbers a spectrum has."""

Run = Callable[[Mapping[str, Tensor]], Any]
"""The model's own forward."""


def example_of(pretrained: Pretrained, run: Run, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """One sample of every input.

    Args:
        pretrained: a model that does not take text.
        run: its forward; what it does not take, it refuses.
        given: a batch of the user's, of which the first sample is taken; without one, a picture of the size that the
            configuration names, or sound in the form that the model accepts.

    Raises:
        InputError: ``given`` lacks an input, or no form is accepted.
    """
    dtype = pretrained.model.dtype
    if given is not None:
        if missing := [name for name in pretrained.inputs if name not in given]:
            raise InputError(f"{pretrained.source} takes {missing[0]}; the calibration inputs hold {', '.join(given)}")
        first = {name: given[name][:1] for name in pretrained.inputs}
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in first.items()}
    for shape in (shape for config in _configs(pretrained.model.config) for shape in _shapes(config)):
        example = {name: torch.zeros(1, *shape, dtype=dtype) for name in pretrained.inputs}
        if _takes(run, example):
            return example
    raise InputError(
        f"{pretrained.source} takes {pretrained.inputs[0]} of unknown shape; give --calibration-inputs FOLDER"
    )


def open_axis(run: Run, example: Mapping[str, Tensor]) -> int | None:
    """The axis of sound that may be of any length, or None: the model is asked with half of the example.

    Pictures, which have an axis more, keep their size. Spectra that have a place each, as a transformer of images has
    for its patches, do as well.
    """
    ((name, one),) = example.items()
    if one.dim() > 3:
        return None
    axes = (axis for axis in range(1, one.dim()) if one.shape[axis] > 1)
    return next((axis for axis in axes if _takes(run, {name: one.narrow(axis, 0, one.shape[axis] // 2)})), None)


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and those inside it, as that of the pictures is where text is beside them."""
    yield config
    yield from (inner for inner in vars(config).values() if isinstance(inner, PreTrainedConfig))


def _shapes(config: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of a sample to try: a picture, spectra in either order, a wave."""
    size = getattr(config, "image_size", getattr(config, "input_size", None))
    channels = getattr(config, "num_channels", 3)  # some say nothing of colours
    if isinstance(size, int | list | tuple) and isinstance(channels, int):
        height, width = size if isinstance(size, list | tuple) else (size, size)
        yield channels, height, width
    bands = next((found for name in BANDS if (found := getattr(config, name, None))), None)
    if bands is not None:
        fixed = getattr(config, "max_length", None), getattr(config, "max_source_positions", None)
        halved = None if fixed[1] is None else 2 * fixed[1]  # Whisper's convolutions halve the frames
        for frames in (FRAMES, fixed[0], halved):
            if frames is not None:
                yield frames, bands
                yield bands, frames
    yield (SAMPLES,)


def _takes(run: Run, example: Mapping[str, Tensor]) -> bool:
    try:
        with torch.no_grad():
            run(example)
    except Exception:  # a model's own code refuses what it does not take by whatever it likes
        return False
    return True
