"""Keep what a long run has done so far in a folder, so that a run that was stopped goes on from there."""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .dialect.storage import Storage
from .errors import InputError
from .frontend.batches import Batch
from .quantise import Gridded
from .recipe import BlockReport, FoldReport, LinearReport, Recipe, TuneReport

RUN = "run.json"
SUFFIX = ".checkpoint.safetensors"
PARTIAL = ".partial-"
"""In front of the name of what is being written; a run that is killed leaves it."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder of steps that are done, each one file of tensors and notes.

    Attributes:
        folder: where they are.
    """

    folder: Path

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
                if json.loads(file.read_text(encoding="utf-8")) != dict(run):
                    raise InputError(f"{folder} holds a run of another model, recipe or text; give another folder")
            elif any(not file.name.startswith(PARTIAL) for file in folder.iterdir()):
                raise InputError(f"{folder} is not empty and holds no checkpoint; give another folder")
            else:
                _write(file, lambda path: path.write_text(json.dumps(run), encoding="utf-8"))
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} cannot hold a checkpoint: {error}") from error
        return cls(folder)

    def save(self, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep one step.

        Raises:
            InputError: it cannot be written.
        """
        own = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
        try:
            _write(self._file(name), lambda path: save_file(own, path, metadata={"notes": json.dumps(notes)}))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.folder} cannot be written: {error}") from error

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and notes of one step; None if it is not done.

        Raises:
            InputError: the file is damaged.
        """
        if not self._file(name).is_file():
            return None
        try:
            with safe_open(self._file(name), framework="pt") as stored:
                names = stored.keys()
                return {name: stored.get_tensor(name) for name in names}, json.loads(stored.metadata()["notes"])
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{self._file(name)} cannot be read: {error}; remove it to do that step again") from error

    def remove(self) -> None:
        """Delete the steps and, if nothing else is in it, the folder."""
        for file in [*self.folder.glob(f"*{SUFFIX}"), *self.folder.glob(f"{PARTIAL}*"), self.folder / RUN]:
            file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"


def fingerprint(recipe: Recipe, params: Mapping[str, Tensor], batches: Sequence[Batch]) -> dict[str, Any]:
    """What decides a run: our version, the recipe by its words, masks, weights and calibration by their CRC-32."""
    masks = recipe.given.keep if recipe.given else {}
    return {
        "version": version("sparsify-export"),
        "recipe": repr(replace(recipe, given=None)),
        "masks": _crc(masks[key] for key in sorted(masks)),
        "weights": _crc(params[key] for key in sorted(params)),
        "calibration": _crc(x for batch in batches for x in (*batch.inputs, batch.token_mask) if x is not None),
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


_PARTS = ("exact", "top", "strengths")


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """Beside, then renamed, so that a file that is there is whole."""
    partial = file.with_name(f"{PARTIAL}{file.name}.{os.getpid()}")
    try:
        write(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _crc(tensors: Iterable[Tensor]) -> int:
    found = 0
    for tensor in tensors:
        found = zlib.crc32(repr((tensor.dtype, tuple(tensor.shape))).encode(), found)
        if tensor.numel():
            found = zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data, found)
    return found
