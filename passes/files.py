"""What is looked at before a file that somebody else may have made is opened: its kind and its size."""

import json
import stat
from pathlib import Path
from typing import Any

from .errors import InputError

LARGEST_JSON = 256 << 20
"""Bytes; a large tokenizer has 50 MB."""


def check_regular(path: Path, *, most: int | None = None) -> None:
    """Refuse what is missing, is not a regular file (a pipe would hang, a device never ends), or is too large.

    Raises:
        InputError: it is.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"cannot read {path}: it is not a regular file")
    if most is not None and found.st_size > most:
        raise InputError(f"cannot read {path}: it has {found.st_size} bytes; want {most} at most")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: it cannot be read, is too large, or is not JSON.
    """
    check_regular(path, most=LARGEST_JSON)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise InputError(f"{path} is damaged: it is not JSON ({error})") from error
    except RecursionError as error:
        raise InputError(f"{path} is damaged: it is nested too deeply") from error
