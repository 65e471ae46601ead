"""Where a compilation writes: everything is built beside its final place and moved there when it is whole."""

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .dense_checkpoint import DenseCheckpoint
from .model_folder import write_configuration
from .passes.errors import InputError, VerificationError
from .passes.frontend.load import Pretrained
from .passes.onnx.plugin import LIBRARY
from .publish import (
    PARTIAL,
    files_below,
    is_data,
    listed,
    locked,
    open_stage,
    publish_files,
    publish_folder,
    recover,
)
from .report import Report
from .runtime import tensorrt
from .runtime.tensorrt.session import SUFFIXES, is_plan
from .settings import Settings
from .signals import unstopped

SCRIPT = "build_plan.py"
LONGEST = 64
"""Bytes that the names beside OUT have more than OUT's own."""


@dataclass(frozen=True)
class Target:
    """Where the results go: built beside their final place, moved there when they are whole.

    Attributes:
        out: the final file or folder.
        folder: whether ``out`` is a folder.
        overwrite: whether what is there is replaced.
        stage: the folder that things are built in, this run's own.
        also: the dense checkpoint that is written too, if one is.
    """

    out: Path
    folder: bool
    overwrite: bool
    stage: Path
    also: DenseCheckpoint | None = None
    _locks: list[int] = field(default_factory=list, repr=False, compare=False)

    @property
    def model(self) -> Path:
        """The ONNX file while it is being built; that of an engine is called ``.trt.onnx``."""
        if is_plan(self.out):
            return self.stage / f"{self.out.stem}.trt.onnx"
        return self.stage / ("model.onnx" if self.folder else self.out.name)

    @property
    def report(self) -> Path:
        """The report, which lists what was written and is the mark that it is ours, in its final place."""
        return self.out / "report.json" if self.folder else self.out.with_name(f"{self.out.name}.report.json")

    @classmethod
    def check(cls, name: str, *, overwrite: bool, inputs: Iterable[Path] = ()) -> "Target":
        """Refuse what cannot be written before any work is done, and clear what a dead run left there.

        Args:
            name: what the user calls it.
            overwrite: whether what is there may be replaced.
            inputs: files and folders that are read, which the result must not replace.

        Raises:
            InputError: an unknown suffix, a missing or unwritable parent, an input would be replaced, or something is
                there already that may not be.
        """
        if "\0" in name or not name:
            raise InputError(f"{name!r} cannot be an output; want a file or a folder")
        out = Path(name)
        folder = name.endswith(("/", os.sep)) or out.suffix == ""
        if not folder and out.suffix not in (".onnx", *SUFFIXES):
            raise InputError(f"{out} ends in {out.suffix}; want .onnx, .plan, or a folder name without a suffix")
        try:
            _check_parent(out)
            if folder and out.is_symlink():
                out = out.resolve()
        except OSError as error:  # a name that is too long, among others
            raise InputError(f"{name} cannot be written: {error.strerror}") from error
        target = cls(out, folder, overwrite, out.with_name(f".{out.name}.{secrets.token_hex(4)}{PARTIAL}"))
        try:
            recover(out, target.report.name)
        except OSError as error:
            raise InputError(f"cannot clear what an earlier run left beside {out}: {error}") from error
        target._refuse_taken()
        for given in inputs:
            target.refuse_to_replace(given)
        return target

    def refuse_to_replace(self, given: Path, what: str = "is read") -> None:
        """Refuse to replace or remove a file or folder that this run reads.

        Raises:
            InputError: it would be.
        """
        file, out = given.resolve(), self.out.resolve()
        ours = {out} if self.folder else {path.resolve() for path in (*self._written(), *self._old_data())}
        if file in ours or (self.folder and out in file.parents):
            raise InputError(f"{self.out} would overwrite {given}, which {what}; give another output")

    def open(self) -> None:
        """Make the folder that things are built in."""
        try:
            self._locks.append(open_stage(self.stage))
        except OSError as error:
            raise InputError(f"{self.out} cannot be written: {error.strerror}") from error

    def finish(self, pretrained: Pretrained | None, report: Report) -> None:
        """Add what belongs beside the model and move everything into place; an ONNX model has nothing beside it.

        Raises:
            InputError: the disk is full, or something came to be there while this run was under way.
        """
        try:
            if self.folder and pretrained is not None:
                write_configuration(pretrained, self.stage)
            report.save(self.stage / self.report.name, files=[*files_below(self.stage), self.report.name])
            if self.also is not None and pretrained is not None:
                self.also.write(pretrained)
            with unstopped(), locked(self.out.parent):
                self._refuse_taken()
                if self.folder:
                    publish_folder(self.stage, self.out, self.report.name)
                else:
                    stale = [file.name for file in self._written() if file.name not in (self.model.name, SCRIPT)]
                    publish_files(
                        self.stage, self.out.parent, model=self.model.name, report=self.report.name, stale=stale
                    )
                self._unlock()
            if self.also is not None:
                with unstopped():
                    self.also.publish()
        except OSError as error:
            raise InputError(f"{self.out} cannot be written: {error.strerror}") from error

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What goes wrong inside leaves nothing behind, or what failed its verification under a name that says so."""
        try:
            yield
        except VerificationError as error:
            kept = self._keep_failed()
            raise VerificationError(f"{error}; kept as {kept}" if kept else str(error)) from error
        finally:
            with unstopped():
                shutil.rmtree(self.stage, ignore_errors=True)
                self._unlock()
                if self.also is not None:
                    self.also.clear()

    def _keep_failed(self) -> Path | None:
        """Keep the artifact that failed its verification, under a name that says so and that nothing else has."""
        if not self.model.is_file():
            return None
        failed, number = self.out.with_name(f"{self.out.name}.failed"), 1
        while os.path.lexists(failed):
            number += 1
            failed = self.out.with_name(f"{self.out.name}.failed-{number}")
        self.stage.rename(failed)
        return failed

    def _unlock(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def _written(self) -> list[Path]:
        """The files beside each other whose names are known before they are written."""
        names = [self.out.name, self.report.name]
        if is_plan(self.out):
            names += [f"{self.out.stem}{end}" for end in (".trt.onnx", ".trt.json", ".dense.plan")]
        return [self.out.with_name(name) for name in names]

    def _old_data(self) -> list[Path]:
        """The data files of the model that is replaced, which go with it."""
        return [self.out.with_name(name) for name in listed(self.report) if is_data(name, self.model.name)]

    def _refuse_taken(self) -> None:
        """Refuse what is there already and may not be replaced."""
        if os.path.lexists(self.out) and self.out.is_dir() != self.folder:
            raise InputError(f"{self.out} is {'a file, not a folder' if self.folder else 'a folder, not a file'}")
        if self.folder:
            self._refuse_strangers()
            return
        there = [file for file in self._written() if os.path.lexists(file)]
        if is_plan(self.out):
            there += [file for file, own in self._shared() if file.exists() and not _same(file, own)]
        if there and not self.overwrite:
            raise InputError(f"{there[0]} exists already; remove it or give --overwrite")
        if folders := [file for file in there if file.is_dir()]:
            raise InputError(f"{folders[0]} is a folder, which --overwrite will not remove")

    def _refuse_strangers(self) -> None:
        """Refuse a folder that holds a file which no run of ours wrote."""
        if not os.path.lexists(self.out):
            return
        if not self.overwrite:
            raise InputError(f"{self.out} exists already; remove it or give --overwrite")
        ours = listed(self.report)
        if not ours and any(self.out.iterdir()):
            raise InputError(f"{self.out} was not written by sparsify-export, so --overwrite will not remove it")
        if strangers := sorted(set(files_below(self.out)) - set(ours)):
            raise InputError(
                f"{self.out / strangers[0]} was not written by sparsify-export, so --overwrite will not remove "
                f"{self.out}; move it elsewhere"
            )

    def _shared(self) -> list[tuple[Path, Path]]:
        """What engines in one folder have in common, with where it comes from."""
        own = [Path(tensorrt.__file__).with_name(SCRIPT), Path(__file__).with_name(LIBRARY)]
        return [(self.out.with_name(file.name), file) for file in own if file.is_file()]


def inputs_of(source: str, settings: Settings, checkpoint: Path | None) -> list[Path]:
    """The files and folders that a compilation reads or keeps, a hub id left out."""
    calibration, recipe = settings.calibration, settings.recipe
    given = [Path(source), calibration.inputs, settings.evaluate, Path(calibration.text)]
    given += [recipe.given.file] if recipe and recipe.given else []
    found = [path for path in given if path is not None and os.path.lexists(path)]
    return found if checkpoint is None else [*found, checkpoint]


def _check_parent(out: Path) -> None:
    if not out.parent.is_dir():
        raise InputError(f"{out} cannot be written: {out.parent} is not a folder")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"{out} cannot be written: no permission to write in {out.parent.resolve()}")
    most, size = os.pathconf(out.parent, "PC_NAME_MAX") - LONGEST, len(os.fsencode(out.name))
    if size > most:
        raise InputError(f"{out.name[:40]}... cannot be written: its name has {size} bytes; want {most} at most")


def _same(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()
