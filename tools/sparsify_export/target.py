"""Where a compilation writes: everything is built beside its final place and moved there when it is whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .passes.errors import InputError, VerificationError
from .passes.frontend.load import Pretrained
from .report import Report
from .runtime.tensorrt.session import SUFFIXES, is_plan


@dataclass(frozen=True)
class Target:
    """Where the results go: built beside their final place, moved there when they are whole.

    Attributes:
        out: the final file or folder.
        folder: whether ``out`` is a folder.
        stage: the folder that things are built in.
    """

    out: Path
    folder: bool
    stage: Path

    @property
    def model(self) -> Path:
        """The ONNX file while it is being built; that of an engine is called ``.trt.onnx``."""
        if is_plan(self.out):
            return self.stage / f"{self.out.stem}.trt.onnx"
        return self.stage / ("model.onnx" if self.folder else self.out.name)

    @classmethod
    def check(cls, name: str, *, overwrite: bool) -> "Target":
        """Refuse what cannot be written before any work is done.

        Raises:
            InputError: an unknown suffix, a missing or unwritable parent, or something is there already that may not
                be replaced.
        """
        out = Path(name)
        folder = name.endswith(("/", os.sep)) or out.suffix == ""
        if not folder and out.suffix not in (".onnx", *SUFFIXES):
            raise InputError(f"{out} ends in {out.suffix}; want .onnx, .plan, or a folder name without a suffix")
        beside = [out.with_suffix(".trt.onnx")] if is_plan(out) else []
        if not overwrite and (there := [file for file in (out, *beside) if file.exists()]):
            raise InputError(f"{there[0]} exists already; remove it or give --overwrite")
        if out.is_dir() != folder and out.exists():
            raise InputError(f"{out} is {'a file, not a folder' if folder else 'a folder, not a file'}")
        if folder and out.is_dir() and any(out.iterdir()) and not (out / "report.json").is_file():
            raise InputError(f"{out} was not written by sparsify-export, so --overwrite will not remove it")
        if not out.parent.is_dir():
            raise InputError(f"{out} cannot be written: {out.parent} is not a folder")
        if not os.access(out.parent, os.W_OK):
            raise InputError(f"{out} cannot be written: no permission to write in {out.parent.resolve()}")
        return cls(out, folder, out.with_name(f".{out.name}.partial"))

    def open(self) -> None:
        """Make the folder that things are built in."""
        try:
            shutil.rmtree(self.stage, ignore_errors=True)
            self.stage.mkdir()
        except OSError as error:
            raise InputError(f"{self.out} cannot be written: {error.strerror}") from error

    def finish(self, pretrained: Pretrained | None, report: Report) -> None:
        """Add what belongs beside the model and move everything into place; an ONNX model has nothing beside it."""
        try:
            if self.folder:
                report.save(self.stage / "report.json")
                if pretrained is not None:
                    self._configure(pretrained)
                if self.out.exists():
                    shutil.rmtree(self.out)
                self.stage.rename(self.out)
                return
            report.save(self.stage / f"{self.out.name}.report.json")
            if is_plan(self.out):  # engines of an earlier model must not stay beside this one
                for engine in (self.out, self.out.with_suffix(".dense.plan")):
                    engine.unlink(missing_ok=True)
            for file in sorted(self.stage.iterdir()):
                file.replace(self.out.parent / file.name)
            self.stage.rmdir()
        except OSError as error:
            raise InputError(f"{self.out} cannot be written: {error.strerror}") from error

    def _configure(self, pretrained: Pretrained) -> None:
        pretrained.model.config.save_pretrained(self.stage)
        if pretrained.kind == "causal":
            pretrained.model.generation_config.save_pretrained(self.stage)
        if pretrained.tokenizer is not None:
            pretrained.tokenizer.save_pretrained(self.stage)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What goes wrong inside leaves nothing behind, or what failed its verification under a name that says so."""
        try:
            yield
        except VerificationError:
            self.fail()
            raise
        except BaseException:
            self.discard()
            raise

    def fail(self) -> None:
        """Keep the artifact that failed its verification, under a name that says so."""
        failed = self.out.with_name(f"{self.out.name}.failed")
        if failed.exists():
            shutil.rmtree(failed)
        self.stage.rename(failed)

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.stage, ignore_errors=True)
