"""Keep what a long run has done so far in a folder, so that a run that was stopped goes on from there.

Nothing is trusted that is read back: ``run.json`` says what the run is made of, and every step file has a checksum of
its names, shapes, values and notes, and of the run that it belongs to.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.fx.node import map_arg

from .dialect.storage import Storage
from .errors import InputError
from .frontend.batches import Batch
from .fx.partition import Part, Partition
from .mapped import as_bytes
from .quantise import Gridded
from .recipe import BlockReport, FoldReport, LinearReport, Recipe, TuneReport

FORMAT: Final = 3
"""Of the files in the folder, and of what is hashed; another one is another run."""
RUN = "run.json"
SUFFIX = ".checkpoint.safetensors"
PARTIAL = ".partial-"
"""In front of the name of what is being written; a run that is killed leaves it."""
PARTS = {
    "format": "the format of checkpoints",
    "version": "the version of sparsify-export",
    "torch": "the version of torch",
    "threads": "the number of threads",
    "recipe": "the recipe",
    "masks": "the masks",
    "graph": "the model's graph",
    "weights": "the weights",
    "text": "the calibration text",
}
"""What decides a run, and what it is called in messages."""
ALIGNMENT = 64
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors names them."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder of steps that are done, each one file of tensors and notes.

    Attributes:
        folder: where they are.
        run: a digest of what decides the result; a step of another run is refused.
    """

    folder: Path
    run: str = ""

    @staticmethod
    def check(folder: Path) -> None:
        """Refuse a folder that cannot be used, before any work is done.

        Raises:
            InputError: it is a file, cannot be written, or holds something else.
        """
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(f"{folder} cannot hold a checkpoint: {there} is no folder that can be written")
        if there == folder and not (folder / RUN).is_file() and not _empty(folder):
            raise InputError(f"{folder} is not empty and holds no checkpoint; give another folder")

    @classmethod
    def open(cls, folder: Path, run: Mapping[str, Any]) -> "Checkpoint":
        """Begin a run, or go on with the one that the folder holds.

        Args:
            folder: made if it is missing.
            run: what decides the result, JSON-able; see `fingerprint`.

        Raises:
            InputError: the folder holds another run or something else, or cannot be written.
        """
        file = folder / RUN
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if file.is_file():
                held = json.loads(file.read_text(encoding="utf-8"))
                if not isinstance(held, dict):
                    raise ValueError(f"{RUN} is damaged")
                if other := _differences(held, run):
                    raise InputError(f"{folder} holds another run: {other}; give another folder")
            elif not _empty(folder):
                raise InputError(f"{folder} is not empty and holds no checkpoint; give another folder")
            else:
                _write(file, lambda path: path.write_text(json.dumps(run), encoding="utf-8"))
        except InputError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{folder} cannot hold a checkpoint: {error}") from error
        return cls(folder, hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest())

    def save(self, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> dict[str, Tensor]:
        """Keep one step. Tensors are written one by one, so none but those that are not contiguous are copied.

        Returns:
            The tensors, as they lie in the file that was written.

        Raises:
            InputError: it cannot be written.
        """
        text = json.dumps(notes)
        metadata = {"notes": text, "checksum": self._checksum(name, tensors, text)}
        try:
            _write(self._file(name), lambda path: _write_tensors(path, tensors, metadata))
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written: {error}") from error
        with safe_open(self._file(name), framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in tensors}

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and notes of one step; None if it is not done.

        Raises:
            InputError: the file is damaged, or of another run or step.
        """
        file = self._file(name)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata() or {}
                names = stored.keys()
                tensors = {name: stored.get_tensor(name) for name in names}
            text = metadata.get("notes", "")
            if metadata.get("checksum") != self._checksum(name, tensors, text):
                raise ValueError("it does not have the checksum that it was written with, or is of another run or step")
            return tensors, json.loads(text)
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{file} cannot be read: {error}; remove it to do that step again") from error

    def remove(self) -> None:
        """Delete the steps and, if nothing else is in it, the folder."""
        for file in [*self.folder.glob(f"*{SUFFIX}"), *self.folder.glob(f"{PARTIAL}*"), self.folder / RUN]:
            file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _checksum(self, name: str, tensors: Mapping[str, Tensor], notes: str) -> str:
        return _hash(tensors.items(), repr((FORMAT, self.run, name, notes)))


def fingerprint(
    recipe: Recipe, params: Mapping[str, Tensor], batches: Sequence[Batch], partition: Partition | None = None
) -> dict[str, Any]:
    """What decides a run: versions, threads, the recipe by its words, and hashes of all tensors with names and shapes.

    Args:
        recipe: what to make.
        params: weights by key.
        batches: calibration batches.
        partition: the model; its graph is hashed too, for what is a number in it and no weight.
    """
    masks = recipe.given.keep if recipe.given else {}
    inputs = [
        (f"{index}.{place}", x)
        for index, batch in enumerate(batches)
        for place, x in enumerate((*batch.inputs, batch.token_mask))
        if x is not None
    ]
    code = "" if partition is None else repr([(part.path, _operations(part)) for part in partition.parts])
    return {
        "format": FORMAT,
        "version": version("sparsify-export"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),  # the rest of a run would have other bits
        "recipe": {each.name: repr(getattr(recipe, each.name)) for each in fields(recipe) if each.name != "given"},
        "masks": _hash(masks.items()),
        "graph": hashlib.sha256(code.encode()).hexdigest(),
        "weights": _hash(params.items()),
        "text": _hash(inputs),
    }


def from_grids(grids: Mapping[str, Gridded]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights on their grids as tensors and notes of a step."""
    tensors = {f"{part}/{key}": getattr(its, part) for key, its in grids.items() for part in _PARTS}
    return tensors, {key: {"path": its.path, "storage": asdict(its.storage)} for key, its in grids.items()}


def to_grids(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> dict[str, Gridded]:
    """The reverse of `from_grids`."""
    return {
        key: Gridded(its["path"], Storage(**its["storage"]), *(tensors[f"{part}/{key}"] for part in _PARTS))
        for key, its in notes.items()
    }


def to_report(notes: Mapping[str, Any]) -> BlockReport:
    """A block's report from its ``asdict`` after a way through JSON."""
    return BlockReport(
        notes["path"],
        tuple(LinearReport(**{**linear, "shape": tuple(linear["shape"])}) for linear in notes["linears"]),
        tuple(FoldReport(**fold) for fold in notes["folds"]),
        notes["error"],
        tuple(TuneReport(**{**half, "linears": tuple(half["linears"])}) for half in notes["tuned"]),
    )


def _operations(part: Part) -> list[str]:
    """The operations of a part and the numbers in them, sorted: models are traced in another order in every process."""
    calls = []
    for node in part.module.graph.nodes:
        if node.op not in ("placeholder", "output"):
            calls.append(str((str(node.target), map_arg((node.args, dict(node.kwargs)), lambda argument: None))))
    return sorted(calls)


_PARTS = ("exact", "top", "strengths")


def _differences(held: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """What two runs differ in, in words; "" if in nothing."""
    found = []
    for part in dict.fromkeys([*held, *run]):
        one, other = held.get(part), run.get(part)
        if one == other:
            continue
        named = PARTS.get(part, part)
        if part == "recipe" and isinstance(one, dict) and isinstance(other, dict):
            names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
            named += f" ({', '.join(names)})"
        elif part in ("format", "version", "torch", "threads"):
            named += f" ({one} there, {other} here)"
        found.append(named)
    return f"other are {', '.join(found)}" if found else ""


def _empty(folder: Path) -> bool:
    """Whether there is nothing in a folder but what a killed run was writing."""
    return all(file.name.startswith(PARTIAL) for file in folder.iterdir())


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """Beside, to the disk, then renamed, so that a file that is there is whole, after a power cut too."""
    partial = file.with_name(f"{PARTIAL}{file.name}.{os.getpid()}")
    try:
        write(partial)
        sync_to_disk(partial)
        partial.replace(file)
        sync_to_disk(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file: length and JSON of the header, then the tensors as they lie in memory.

    The library's own writer first makes bytes of all of them. Tensors begin at multiples of 64 bytes: products of
    numbers that begin elsewhere may have other bits than those of an unbroken run.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    ordered = sorted(tensors.items(), key=lambda pair: pair[1].nbytes % ALIGNMENT > 0)  # the format allows no holes
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(as_bytes(tensor))


def _hash(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """SHA-256 of a text and of tensors by name, in the order of the names."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        if tensor.numel():
            found.update(as_bytes(tensor))
    return found.hexdigest()
