"""Open an exported ONNX file in ONNX Runtime, decode with its KV cache, and prove which kernels ran."""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ..passes.dialect import experts
from ..passes.dialect.packed import OPS
from ..passes.errors import InputError
from ..passes.onnx.cache_in_place import is_in_place
from ..passes.onnx.protos import data_files
from . import library_path

log = logging.getLogger(__name__)

SPARSE_OPS = (*OPS, *experts.OPS)
"""Names of the ops of our domain, as ONNX Runtime's profile calls them."""

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]
Past: TypeAlias = Sequence[Any]
"""The KV cache: one OrtValue ``[batch, kv_heads, past, head_dim]`` for every key and value, in file order."""

ROOM = 256
"""Tokens that the buffer of a cache in place grows by at least."""

CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def open_session(
    path: Path,
    *,
    kernels: bool = True,
    threads: int | None = None,
    profile: Path | None = None,
    fold_constants: bool = True,
) -> ort.InferenceSession:
    """Open an ONNX file on the CPU.

    Our library is registered whether or not the file uses it: it costs nothing where it is not used, and so no
    file has to be read twice. Where the file was not made by us it changes nothing.

    Args:
        path: the file, or a folder that holds ``model.onnx``.
        kernels: run the sparse ops by our kernels; False leaves them to the functions inside the file.
        threads: how many threads an op uses; None lets ONNX Runtime decide (one a physical core).
        profile: record every op that runs, to a file whose name starts so; ``sparse_runs`` reads it.
        fold_constants: compute once, before the first run, what depends on weights alone. Without our kernels that
            unpacks every sparse weight and keeps it: for a file that is run once it costs time and five times the
            memory.

    Raises:
        InputError: there is no such file, or ONNX Runtime cannot read it.
    """
    options = options_for(kernels=kernels)
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    file = model_file(path)
    try:
        data_files(file)  # refuses what would be waited for, or lies elsewhere
    except InputError as error:
        if error.__cause__ is None:  # else it cannot be read, which ONNX Runtime says better
            raise
    try:
        disabled = [] if fold_constants else ["ConstantFolding"]
        return ort.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as error:  # its exceptions have no common base class of their own
        raise InputError(f"cannot open {file}: {_first_line(error)}") from error


def options_for(*, kernels: bool) -> ort.SessionOptions:
    """Options with which nothing is printed, and our library where ``kernels`` says so."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong arrives as an exception; on the terminal it stands once
    if kernels:
        options.register_custom_ops_library(str(library_path()))
    return options


def model_file(path: Path) -> Path:
    """The ONNX file that a path means: itself, or ``model.onnx`` in a folder.

    Raises:
        InputError: it does not exist, or is not called ``.onnx``.
    """
    file = path / "model.onnx" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    if file.suffix != ".onnx":
        raise InputError(f"{file} is not an ONNX file: its name does not end in .onnx")
    return file


def sparse_runs(session: ort.InferenceSession) -> dict[str, int]:
    """How often each sparse op was run by our kernels, from ONNX Runtime's own profile; ends the profiling.

    Where the functions inside the file ran instead, their standard ops stand in the profile and the counts are
    empty: a sparse op under its own name is a sparse op that our library ran.

    Args:
        session: opened with ``profile``. The profile is deleted when it has been read.

    Raises:
        ValueError: the session records no profile.
    """
    name = session.end_profiling()
    if not name:
        raise ValueError("the session records no profile; open it with profile=")
    file = Path(name)
    events = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    ops = [event["args"].get("op_name") for event in events if event.get("cat") == "Node"]
    return dict(Counter(op for op in ops if op in SPARSE_OPS))


class CausalSession:
    """A causal language model with its KV cache, which stays inside ONNX Runtime.

    A file says in its metadata whether it keeps the cache in place (passes/onnx/cache_in_place.py). Then a cache is a
    buffer with room behind its tokens, and a step writes into the one that it was given; otherwise it returns another.

    Attributes:
        session: the session; its file has ``input_ids``, ``attention_mask`` and ``past_key_values.*`` as inputs,
            ``logits`` and ``present.*`` as outputs.
        vocabulary: how many tokens the logits tell apart.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        """Check the names of inputs and outputs.

        Raises:
            InputError: the file is not a causal language model with a KV cache, or leaves the cache's sizes open.
        """
        inputs = {i.name: i for i in session.get_inputs()}
        outputs = {o.name: o for o in session.get_outputs()}
        self._past = [name for name in inputs if name.startswith("past_key_values.")]
        self._present = [name.replace("past_key_values.", "present.", 1) for name in self._past]
        wanted = {"input_ids", "attention_mask"}
        if not self._past or set(inputs) - set(self._past) != wanted or set(outputs) != {"logits", *self._present}:
            got = ", ".join(name for name in inputs if name not in self._past)
            raise InputError(
                f"not a causal language model: want input_ids, attention_mask and a KV cache in, logits and the "
                f"cache out; it takes {got} and {len(self._past)} cache tensors, and gives {', '.join(outputs)[:60]}"
            )
        self.session = session
        shapes = {name: tuple(value.shape) for name, value in (inputs | outputs).items()}
        if wrong := [name for name in self._past if len(shapes[name]) != 4]:
            raise InputError(f"{wrong[0]} is {list(shapes[wrong[0]])}; want [batch, heads, past, size]")
        if len(shapes["logits"]) != 3 or not isinstance(shapes["logits"][-1], int):
            raise InputError(f"logits is {list(shapes['logits'])}; want [batch, sequence, a number of tokens]")
        self.vocabulary = int(shapes["logits"][-1])
        self._shapes = [tuple(inputs[name].shape) for name in self._past]
        self._types = [inputs[name].type for name in self._past]
        told = session.get_modelmeta().custom_metadata_map if isinstance(session, ort.InferenceSession) else {}
        self._in_place = is_in_place(told)
        for name, (_, heads, _, size) in zip(self._past, self._shapes, strict=True):
            if not (isinstance(heads, int) and isinstance(size, int)):
                raise InputError(f"{name} is {list(inputs[name].shape)}; want numbers for its heads and their size")

    def empty_past(self, batch: int) -> Past:
        """A cache of length 0."""
        return self.random_past(batch, 0)

    def random_past(self, batch: int, length: int) -> Past:
        """A cache of ``length`` tokens with normal random numbers, the same at every call: for timing."""
        if unknown := set(self._types) - CACHE_TYPES.keys():
            raise InputError(f"the KV cache is {min(unknown)}; want {' or '.join(CACHE_TYPES)}")
        rng = np.random.default_rng(0)
        shapes = [(batch, heads, length, size) for _, heads, _, size in self._shapes]
        arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
        typed = [array.astype(CACHE_TYPES[name]) for array, name in zip(arrays, self._types, strict=True)]
        past = [ort.OrtValue.ortvalue_from_numpy(array) for array in typed]
        return _with_room(past, length, length + 1) if self._in_place and length else past

    def step(self, ids: Ints, mask: Ints, past: Past) -> tuple[Floats, Past]:
        """Run some tokens.

        Args:
            ids: ``[batch, sequence]``.
            mask: ``[batch, past + sequence]``, 0 for padding.
            past: the cache so far; its first ``past`` tokens stay as they are, what is behind them may be written.

        Returns:
            Logits ``[batch, sequence, vocabulary]`` and the longer cache.

        Raises:
            InputError: the model fails; or keeps its cache in place, and is to read several tokens of several texts
                behind it, which ONNX Runtime's attention refuses.
        """
        batch, new = ids.shape
        if self._in_place and batch > 1 and 1 < new < mask.shape[1]:
            raise InputError(
                f"{new} tokens of {batch} texts behind a cache: a cache in place takes one text, or one token of each"
            )
        feed = {"input_ids": ort.OrtValue.ortvalue_from_numpy(ids)}
        feed["attention_mask"] = ort.OrtValue.ortvalue_from_numpy(mask)
        run = self._run_in_place if self._in_place else self._run_joined
        try:
            logits, present = run(feed, past, mask.shape[1] - new, mask.shape[1])
        except Exception as error:  # its exceptions have no common base class of their own
            log.warning("ONNX Runtime: %s", error)
            raise InputError(
                f"the model fails on a text of {mask.shape[1]} tokens, which is more than it takes, or it is damaged; "
                "--log-file keeps what ONNX Runtime says"
            ) from error
        return logits.numpy(), present

    def _run_joined(
        self, feed: dict[str, ort.OrtValue], past: Past, length: int, total: int
    ) -> tuple[ort.OrtValue, Past]:
        """One run that returns a cache of its own."""
        feed |= dict(zip(self._past, past, strict=True))
        logits, *present = self.session.run_with_ort_values(["logits", *self._present], feed)
        return logits, present

    def _run_in_place(
        self, feed: dict[str, ort.OrtValue], past: Past, length: int, total: int
    ) -> tuple[ort.OrtValue, Past]:
        """One run that writes behind the ``length`` tokens of the cache, in a larger buffer where it has no room."""
        buffers = _with_room(past, length, total)
        binding = self.session.io_binding()
        binding.bind_output("logits")
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        for name, present, buffer in zip(self._past, self._present, buffers, strict=True):
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(present, buffer)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0], buffers

    def run_only(self, ids: Ints, mask: Ints, past: Past) -> None:
        """Run some tokens, for timing; what moves results to where the caller is may be left out."""
        self.step(ids, mask, past)


def _with_room(past: Past, length: int, total: int) -> Past:
    """The cache in buffers for at least ``total`` tokens: the same ones, or half as large again with a copy of it."""
    _, _, capacity, _ = past[0].shape()
    if capacity >= total:
        return past
    wanted = -(-max(total, 3 * capacity // 2) // ROOM) * ROOM
    grown = []
    for old in past:
        batch, heads, _, size = old.shape()
        numbers = old.numpy()
        buffer = np.zeros((batch, heads, wanted, size), numbers.dtype)
        buffer[:, :, :length] = numbers[:, :, :length]
        grown.append(ort.OrtValue.ortvalue_from_numpy(buffer))
    return grown


def _first_line(error: Exception) -> str:
    """What ONNX Runtime says, without ``[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from X failed:``."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .* failed:)?", "", lines[0])
