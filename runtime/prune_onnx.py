"""Prune an ONNX model while ONNX Runtime runs it: every linear is fitted to what the pruned ones in front of it make.

The model is run once, in stretches (`passes.onnx.flow`): up to the first linear, which is pruned on what it reads
there; with the new weights up to the next one that reads something else; and so on. What lives at a cut is kept for
every batch, in mapped files. The steps between a linear and an attention that it is fitted to run twice, and a weight
that is read again further on is observed to there before it is pruned.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ..calibrate.hessian import Hessian
from ..calibrate.statistics import ActNorm
from ..passes.errors import InputError
from ..passes.mapped import give_back, mapped
from ..passes.onnx.attended import averages
from ..passes.onnx.fit import Fit, Fitted, fit_section
from ..passes.onnx.flow import Flow, flow_of, stretch
from ..passes.onnx.protos import read_float
from ..passes.onnx.sections import Reading, Section, Shared, sections
from ..passes.onnx.seeds import seed
from ..passes.onnx.spool import Spool
from ..passes.onnx.twin import link_data
from ..passes.onnx.view import Model
from ..passes.recipe import Timings
from .feeds import Feed
from .session import options_for

Progress = Callable[[str, int, int], None]


def prune_onnx(
    model: Model,
    fit: Fit,
    feeds: Sequence[Feed],
    folder: Path,
    *,
    progress: Progress = lambda stage, done, total: None,
    timings: Timings | None = None,
) -> dict[str, Fitted | str]:
    """Prune the weights of ``fit``.

    Args:
        model: the model they are in; not changed.
        fit: the weights, which linears of the main graph read.
        feeds: the inputs. Where there is an ``attention_mask`` with one entry a token, padding is not counted.
        folder: an empty folder for new weights and for links to those of the model; what is returned reads from it.
        progress: told about every section.
        timings: seconds are added here: running, observing, and what is made of it.

    Returns:
        What became of each weight, by its name, or why it stays as it is.

    Raises:
        InputError: ONNX Runtime cannot run the model, or weights or activations hold NaN.
    """
    timings = timings or Timings()
    flow = flow_of(model, [linear for weight in fit.weights.values() for linear in weight.linears])
    link_data(model.proto, model.path, folder)
    spool = Spool(folder / "new", near=True)
    exchanged: dict[str, onnx.TensorProto] = {}
    states = [dict(feed) for feed in feeds]
    masks = [feed.get("attention_mask") for feed in feeds]
    done: dict[str, Fitted | str] = {}
    at, order = 0, sections(flow, fit.weights.values())
    for number, section in enumerate(order):
        progress("pruning", number, len(order))
        needed = {name for reading in section.readings for name in reading.tensors}
        with timings.stage("propagate"):
            _advance(flow, at, section.begin, states, exchanged, folder)
        at = section.begin
        with timings.stage("observe"):
            behind = sorted(name for name in needed if flow.known_after(name) > at)
            seen = _observe(flow, section, fit.statistic, behind, states, masks, exchanged, folder)

        def keep_new(weight: Shared, new: Tensor) -> Callable[[], Tensor]:
            exchanged[weight.name], read = _stored(weight, new, spool)
            return read

        with timings.stage("update"):
            done |= dict(fit_section(fit, section, seen, keep_new))
        del seen
        give_back()
    return done


def _stored(weight: Shared, new: Tensor, spool: Spool) -> tuple[onnx.TensorProto, Callable[[], Tensor]]:
    """A new weight as the model will read it, and what reads it as ``[out_features, in_features]``."""
    source = weight.linears[0].weight
    held = new if source.value else new.to(source.dtype)
    proto = spool.add(source.name, held if source.rows_first else held.T)

    def read() -> Tensor:
        values = read_float(proto, spool.file.parent)
        return values if source.rows_first else values.T.contiguous()

    return proto, read


def _advance(
    flow: Flow,
    begin: int,
    end: int,
    states: Sequence[dict[str, Any]],
    exchanged: Mapping[str, onnx.TensorProto],
    folder: Path,
) -> None:
    """Run every batch from one cut to the next; what nothing reads any more leaves its state."""
    live = flow.live(end)
    outputs = sorted(name for name in live if begin <= flow.made.get(name, -1) < end)
    run = _opened(flow, begin, end, outputs, states[0], exchanged, folder) if outputs else None
    for state in states:
        if run is not None:
            made = {name: _kept(name, value) for name, value in zip(outputs, run(state), strict=True)}
            state.update(made)
        for name in [name for name in state if name not in live]:
            del state[name]


def _observe(
    flow: Flow,
    section: Section,
    kind: type[ActNorm] | type[Hessian],
    behind: Sequence[str],
    states: Sequence[dict[str, Any]],
    masks: Sequence[np.ndarray | None],
    exchanged: Mapping[str, onnx.TensorProto],
    folder: Path,
) -> dict[Reading, ActNorm | Hessian]:
    """The statistics of what a section's linears read; ``behind`` has to be run for."""
    seen: dict[Reading, ActNorm | Hessian] = {reading: kind(reading.features) for reading in section.readings}
    run = _opened(flow, section.begin, section.known, behind, states[0], exchanged, folder) if behind else None
    for state, mask in zip(states, masks, strict=True):
        values = state if run is None else {**state, **dict(zip(behind, run(state), strict=True))}
        for reading, statistic in seen.items():
            try:
                _count(reading, statistic, values, mask)
            except ValueError as error:
                raise InputError(f"{section.weights[0].path}: {error}") from error
    return seen


def _count(
    reading: Reading, statistic: ActNorm | Hessian, values: Mapping[str, np.ndarray], mask: np.ndarray | None
) -> None:
    """Count the tokens of one batch, padding left out; or what the attention makes of them."""
    x = torch.from_numpy(np.asarray(values[reading.x], np.float32))
    tokens: Tensor | None = None
    if mask is not None and x.dim() > 1 and mask.size == x.shape[:-1].numel():
        tokens = torch.from_numpy(mask != 0).reshape(x.shape[:-1])
    if reading.attention:
        attended = averages(torch.from_numpy(np.asarray(values[reading.attention], np.float32)), x, tokens)
        if attended is not None:
            statistic.update(attended)
            return
    statistic.update(x, tokens)


def _opened(
    flow: Flow,
    begin: int,
    end: int,
    outputs: Sequence[str],
    given: Mapping[str, Any],
    exchanged: Mapping[str, onnx.TensorProto],
    folder: Path,
) -> Callable[[Mapping[str, Any]], list[Any]]:
    """A stretch of the model as a session, and what runs it from a state to its outputs."""
    proto = stretch(flow, begin, end, outputs, given, exchanged)
    seed(proto)
    options = options_for(kernels=True)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class of their own
        raise InputError(_told(flow, error)) from error
    inputs = [value.name for value in session.get_inputs()]

    def run(state: Mapping[str, Any]) -> list[Any]:
        try:
            return list(session.run(outputs, {name: state[name] for name in inputs}))
        except Exception as error:
            raise InputError(_told(flow, error)) from error

    return run


def _told(flow: Flow, error: Exception) -> str:
    return f"cannot calibrate on {flow.model.path}: {str(error).strip().splitlines()[0]}"


def _kept(name: str, value: Any) -> np.ndarray:
    """A result in a mapped file, where it is large.

    Raises:
        InputError: it is no array of numbers.
    """
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        kind = getattr(value, "dtype", type(value).__name__)
        raise InputError(f"{name} is a {kind}, which is not kept between two linears; leave --calibration-inputs out")
    try:
        return mapped(torch.from_numpy(value)).numpy()
    except TypeError:  # torch lacks some unsigned types
        return value
