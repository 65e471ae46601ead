"""Move what was built into place, so that a kill at any moment leaves the old, the new, or what is plainly incomplete.

A run builds in a folder of its own beside its output, ``.OUT.TOKEN.partial``, and holds a lock on it for as long as it
lives. What a dead run left is therefore known by its lock, and the next run to the same output clears it. Every
rename happens under a lock on the folder of the output, so that two runs to one output come one after the other.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from .passes.checkpoint import sync_to_disk
from .passes.errors import InputError
from .passes.onnx.protos import data_files
from .passes.onnx.write import DIGITS

PARTIAL, ASIDE = ".partial", ".old"
JOURNAL, OLDER = "publishing.json", "older"


def is_data(name: str, model: str) -> bool:
    """Whether a file is called as the data files of the model file called ``model`` are."""
    return re.fullmatch(rf"{re.escape(model)}\.[0-9a-f]{{{DIGITS}}}\.data", name) is not None


def listed(report: Path) -> tuple[str, ...]:
    """The files that the run of a report wrote, as that says: plain names below its folder; none where it is not ours.

    The report is our mark: only what it lists is ever removed.
    """
    try:
        report_files = json.loads(report.read_text(encoding="utf-8"))["files"]
        names = [PurePosixPath(name) for name in report_files]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()
    return tuple(str(name) for name in names if not name.is_absolute() and ".." not in name.parts)


def files_below(folder: Path) -> list[str]:
    """Every file below a folder, by its name from there."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other run of ours renames anything in ``folder``.

    Some network file systems cannot lock a folder. There two runs to one output that end in the same moment may leave
    the report of one beside the model of the other; a model and its data belong together all the same.
    """
    held = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def open_stage(stage: Path) -> int:
    """Make the folder of a run and lock it; returns what holds the lock, to be closed."""
    with locked(stage.parent):
        stage.mkdir()
        held = os.open(stage, os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
    return held


def publish_folder(stage: Path, out: Path, report: str) -> None:
    """Put the folder ``stage`` in the place of ``out``, which is missing, empty, or ours by its ``report``."""
    _sync(stage)
    aside = stage.with_suffix(ASIDE)
    if out.exists():
        out.rename(aside)
    stage.rename(out)
    sync_to_disk(out.parent)
    _remove(aside, report)


def publish_files(stage: Path, folder: Path, *, model: str, report: str, stale: Sequence[str]) -> None:
    """Put the files of ``stage`` into ``folder``: data, then the model, the others after it, the report last.

    What described the older model goes before the new one comes, so that it never stands beside the new one. The
    rename of the model is what counts: a run that ends before it is undone, one that ends after it is completed, by
    itself or, where it was killed, by the next one.

    Args:
        stage: the folder of the run.
        folder: where the files belong.
        model: the ONNX file.
        report: the report, which is our mark.
        stale: files of the older model that are of no use beside the new one, data files left out.
    """
    names = sorted(file.name for file in stage.iterdir())
    data = [name for name in names if is_data(name, model)]
    journal = {
        "model": model,
        "data": [
            *(name for name in listed(folder / report) if is_data(name, model)),
            *(name for name in data if not (folder / name).exists()),
        ],
        "rest": [*(name for name in names if name not in (*data, model, report)), report],
    }
    (stage / OLDER).mkdir()
    (stage / JOURNAL).write_text(json.dumps(journal), encoding="utf-8")
    _sync(stage)
    try:
        for name in data:
            (stage / name).replace(folder / name)
        sync_to_disk(folder)
        for name in (report, *stale):
            if os.path.lexists(folder / name):
                (folder / name).rename(stage / OLDER / name)
        (stage / model).replace(folder / model)
        sync_to_disk(folder)
    finally:
        _settle(stage, folder, journal)


def _settle(stage: Path, folder: Path, journal: Mapping[str, Any]) -> None:
    """Complete what was published as far as the model, or undo it; and remove data that no model reads any more."""
    model = journal["model"]
    if (stage / model).exists():
        for file in (stage / OLDER).iterdir():
            file.replace(folder / file.name)
    else:
        for name in journal["rest"]:
            if (stage / name).exists():
                (stage / name).replace(folder / name)
    with suppress(InputError):  # where what is there cannot be read, nobody knows what it needs
        used = {file.name for file in data_files(folder / model)} if (folder / model).exists() else set()
        for name in journal["data"]:
            if is_data(name, model) and name not in used:
                (folder / name).unlink(missing_ok=True)
    sync_to_disk(folder)
    shutil.rmtree(stage)


def recover(out: Path, report: str) -> None:
    """Clear what dead runs to ``out`` left beside it; where one died between two folders, the old one is put back."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]+({re.escape(PARTIAL)}|{re.escape(ASIDE)})")
    with locked(out.parent):
        found = [file for file in out.parent.iterdir() if ours.fullmatch(file.name) and not file.is_symlink()]
        for aside in (file for file in found if file.suffix == ASIDE and not _alive(file.with_suffix(PARTIAL))):
            if out.exists():
                _remove(aside, report)
            else:
                aside.rename(out)
        for stage in (file for file in found if file.suffix == PARTIAL and not _alive(file)):
            try:
                journal = json.loads((stage / JOURNAL).read_text(encoding="utf-8"))
            except (FileNotFoundError, json.JSONDecodeError):  # it died before it had moved anything
                shutil.rmtree(stage)
            else:
                _settle(stage, out.parent, journal)


def _remove(folder: Path, report: str) -> None:
    """Remove the files of a folder that are ours, and the folder if nothing else is in it."""
    if not folder.exists():
        return
    for name in sorted(listed(folder / report), key=lambda name: name == report):  # the mark last
        (folder / name).unlink(missing_ok=True)
    for inner in sorted((file for file in folder.rglob("*") if file.is_dir()), reverse=True):
        with suppress(OSError):
            inner.rmdir()
    with suppress(OSError):
        folder.rmdir()


def _alive(stage: Path) -> bool:
    """Whether the run whose folder this is still runs: it holds the lock, or none can be had here."""
    if not stage.exists():
        return False
    try:
        held = os.open(stage, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(held)
    return False


def _sync(stage: Path) -> None:
    """Every file of a folder, and its names, to the disk."""
    for name in files_below(stage):
        sync_to_disk(stage / name)
    for folder in (stage, *(file for file in stage.rglob("*") if file.is_dir())):
        sync_to_disk(folder)
