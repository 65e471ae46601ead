"""What the inputs of an ONNX model's linears look like: activation norms, by running it in ONNX Runtime."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ..calibrate.statistics import ActNorm
from ..passes.errors import InputError
from ..passes.onnx.twin import read_raw
from .feeds import Feed

BUDGET = 1 << 30
"""Bytes of observed activations in memory at one time."""


def observe(
    path: Path,
    wanted: Mapping[str, int],
    feeds: Sequence[Feed],
    *,
    budget: int = BUDGET,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, ActNorm]:
    """The L2 norms of the features of tensors inside a model, over all tokens of all feeds.

    The tensors are made outputs of the model, as many at a time as the budget allows. The first is observed alone:
    it tells how many tokens there are, and so how large the others will be.

    Args:
        path: the model.
        wanted: how many features (entries on its last axis) each tensor of the main graph has, by name.
        feeds: the inputs. Where there is an ``attention_mask`` with one entry a token, padding is not counted.
        budget: bytes of activations at one time.
        progress: told about every run.

    Raises:
        InputError: ONNX Runtime cannot run the model, or an activation holds NaN.
    """
    statistics = {name: ActNorm(features) for name, features in wanted.items()}
    names = list(wanted)
    done, tokens = 0, 0
    while done < len(names):
        chunk = _chunk(names[done:], wanted, tokens, budget)
        session = _with_outputs(path, chunk)
        for index, feed in enumerate(feeds):
            progress("observing", done * len(feeds) + index * len(chunk), len(names) * len(feeds))
            for name, array in zip(chunk, session.run(chunk, feed), strict=True):
                tokens = max(tokens, array.size // max(1, wanted[name]))
                _count(statistics[name], array, feed.get("attention_mask"), name)
        done += len(chunk)
    return statistics


def _chunk(names: Sequence[str], wanted: Mapping[str, int], tokens: int, budget: int) -> list[str]:
    """The next names that fit the budget together; at least one."""
    chunk, size = [names[0]], 4 * tokens * wanted[names[0]]
    for name in names[1:] if tokens else []:
        size += 4 * tokens * wanted[name]
        if size > budget:
            break
        chunk.append(name)
    return chunk


def _with_outputs(path: Path, names: Sequence[str]) -> ort.InferenceSession:
    """The model with more outputs, as a session; weights beside the file are found there."""
    proto = read_raw(path)
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    try:
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class of their own
        raise InputError(f"cannot observe {path}: {str(error).strip().splitlines()[0]}") from error


def _count(statistic: ActNorm, array: np.ndarray, mask: np.ndarray | None, name: str) -> None:
    x = torch.from_numpy(np.asarray(array, np.float32))
    tokens: Tensor | None = None
    if mask is not None and x.dim() > 1 and mask.size == x.shape[:-1].numel():
        tokens = torch.from_numpy(mask != 0).reshape(x.shape[:-1])
    try:
        statistic.update(x, tokens)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
