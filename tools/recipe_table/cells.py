"""What the cells of the table are: methods, patterns, and what can be varied."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsify_export.calibrate.besa import Learning
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect.storage import FP32, GROUPS, Storage
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.recipe import Distil, Quantise, Recipe, Tune
from sparsify_export.settings import parse_pattern

DENSE = "dense"
BESA: dict[str, Any] = {"score": "wanda", "allocation": Learning()}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"score": "magnitude", "permute": "none"},
    "wanda": {"score": "wanda", "permute": "none"},
    "ria": {"score": "ria", "permute": "none"},
    "ria+fold": {"score": "ria"},
    "sparsegpt": {"update": "sparsegpt", "mask_from": "update", "hessian": "inputs", "permute": "none"},
    "sparsegpt+fold": {"update": "sparsegpt", "mask_from": "update", "hessian": "inputs"},
    "admm+fold": {"update": "admm", "mask_from": "update", "hessian": "inputs"},
    "cg+fold": {"update": "cg", "hessian": "inputs"},
    "admm-cg+fold": {"update": "admm-cg", "mask_from": "update", "hessian": "inputs"},
    "alps+fold": {"update": "alps", "mask_from": "update", "hessian": "inputs"},
    "balanced": {"update": "alps", "mask_from": "update"},
    "halves": {"update": "alps", "mask_from": "update", "tune": Tune(epochs=2)},
    "best": {"update": "alps", "mask_from": "update", "distil": Distil()},
    "wanda+besa-row": BESA,
    "wanda+besa-row+cg": BESA | {"update": "cg"},
    "wanda+besa-row+alps": BESA | {"update": "alps", "mask_from": "update"},
    "best+besa-row": BESA | {"update": "alps", "mask_from": "update", "distil": Distil()},
    "balanced+rtn": {"update": "alps", "mask_from": "update", "quantise": "rtn"},
    "best+sweep": {"update": "alps", "mask_from": "update", "distil": Distil(), "quantise": "sweep"},
    "wanda+besa-row+joint": BESA | {"quantise": "joint"},
}
"""A method is what it changes of a ``Recipe``; a new one is a line here. ``--effort best`` is ``best`` for N:M and
``best+besa-row`` for a fraction of zeros. ``quantise`` is the quantiser of patterns that want one; where it is not said
it is that of the effort: rtn without an update, joint with fine-tuning, else sweep."""

PATTERNS = ("2:4", "4:8", "0.5", "0.6", "0.7", "2:4+int4", "0.5+int4")
STORAGES = {"": FP32, "int8": Storage("int8"), "int4": Storage("int4", 128)}
STORAGES |= {f"int4g{group}": Storage("int4", group) for group in GROUPS}
VARIED: dict[str, tuple[type, tuple[float | str, ...]]] = {
    "samples": (int, (4, 8, 16, 32, 64, 128)),
    "ria-power": (float, (0.0, 0.25, 0.5, 0.75, 1.0)),
    "epochs": (int, (1, 2, 4)),
    "granularity": (str, ("row", "layer")),
    "rate-step": (float, (0.1, 0.05, 0.02, 0.01)),
}
"""What can be varied, its type, and the usual values. The last three are BESA's, for methods that learn rates."""
RATES = ("epochs", "granularity", "rate-step")


@dataclass(frozen=True)
class Cell:
    """One entry of the table; everything that decides its figures.

    Attributes:
        model: as the compiler takes it.
        calibration: text file.
        text: text file to evaluate on.
        method: a key of ``METHODS``, or ``dense``.
        pattern: as ``--nm`` or ``--sparsity``, with ``+int4`` (128 columns a scale), ``+int4g32``, ``+int4g64`` or
            ``+int8`` behind it for quantised weights.
        samples: calibration windows.
        seq_len: tokens in one.
        window: tokens in an evaluation window.
        windows: evaluation windows at most; None for all of the text.
        skip: globs of module paths that stay dense, with commas between them.
        varied: name and value of what is varied, or "".
        value: that value.
    """

    model: str
    calibration: str
    text: str
    method: str
    pattern: str
    samples: int
    seq_len: int
    window: int
    windows: int | None
    skip: str = ""
    varied: str = ""
    value: float | str | None = None


def plan(
    base: Cell, methods: Sequence[str], patterns: Sequence[str], vary: str | None, values: str | None
) -> list[Cell]:
    """The dense model, then every pattern with every method, and with every value of what is varied.

    Left out: N:M patterns with methods that learn rates, which N:M has one of; and weights that are not quantised with
    methods that are there for their quantiser.

    Raises:
        InputError: something asked for is not known.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise InputError(f"--methods {unknown[0]} is not known; want some of {', '.join(METHODS)}")
    for pattern in patterns:
        split_pattern(pattern)
    if vary is None:
        if values is not None:
            raise InputError("--values has no effect without --vary")
        return [base, *(replace(base, method=m, pattern=p) for p in patterns for m in methods if _go_together(m, p))]
    if vary not in VARIED:
        raise InputError(f"--vary {vary} is not known; want one of {', '.join(VARIED)}")
    kind, usual = VARIED[vary]
    try:
        chosen = usual if values is None else [kind(value) for value in values.split(",")]
    except ValueError as error:
        raise InputError(f"--values {values}: want numbers with commas between them") from error
    if vary in RATES:
        methods = [name for name in methods if "allocation" in METHODS[name]]
        if not methods:
            raise InputError(f"--vary {vary} wants a method that learns rates, such as wanda+besa-row")
    cells = [base]
    for pattern in patterns:
        for method in (m for m in methods if _go_together(m, pattern)):
            for value in chosen:
                cell = replace(base, method=method, pattern=pattern, varied=vary, value=value)
                cells.append(replace(cell, samples=value) if vary == "samples" else cell)
                _check(cells[-1])
    return cells


def _check(cell: Cell) -> None:
    """Refuse a value that no recipe can be made with."""
    try:
        recipe_of(cell)
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"--vary {cell.varied} cannot be {cell.value}: {error}") from error


def _go_together(method: str, pattern: str) -> bool:
    zeros, storage = split_pattern(pattern)
    if "quantise" in METHODS[method] and not storage.quantised:
        return False
    return "allocation" not in METHODS[method] or not isinstance(zeros, NM)


def recipe_of(cell: Cell) -> Recipe:
    """What the cell asks of the pipeline."""
    pattern, storage = split_pattern(cell.pattern)
    changed = dict(METHODS[cell.method])
    usual = "joint" if {"tune", "distil"} & changed.keys() else "sweep" if "update" in changed else "rtn"
    quantiser = changed.pop("quantise", usual)
    if storage.quantised:
        changed["quantise"] = Quantise(storage, quantiser)
    if cell.varied == "ria-power":
        changed["ria_power"] = cell.value
    elif cell.varied in RATES:
        changed["allocation"] = _learning(changed["allocation"], cell)
    return Recipe(pattern, skip=tuple(filter(None, cell.skip.split(","))), **changed)


def _learning(learning: Learning, cell: Cell) -> Learning:
    """How rates are learned, with what the cell varies.

    Raises:
        ValueError: there is no such value.
    """
    value: Any = cell.value
    if cell.varied == "epochs":
        return replace(learning, epochs=value)
    if cell.varied == "rate-step":
        if not 0.001 <= value <= 0.5:
            raise ValueError("want 0.001 to 0.5")
        return replace(learning, rate_steps=round(1 / value))
    if value not in ("row", "layer"):
        raise ValueError("want row or layer")
    return replace(learning, per=value, reference="dense" if value == "layer" else "pruned")


def split_pattern(text: str) -> tuple[Any, Storage]:
    """A pattern and how its weights are stored: ``2:4``, ``0.5``, ``2:4+int4``, ``2:4+int4g32``.

    Raises:
        InputError: it is none.
    """
    zeros, _, storage = text.partition("+")
    if storage not in STORAGES:
        raise InputError(
            f"--patterns {text}: {storage} is no storage; want one of {', '.join(STORAGES)[2:]} behind the +"
        )
    try:
        fraction = None if ":" in zeros else float(zeros)
    except ValueError as error:
        raise InputError(f"--patterns {text}: want N:M or a fraction of zeros") from error
    pattern = parse_pattern(zeros if fraction is None else None, fraction)
    return pattern, STORAGES[storage]
