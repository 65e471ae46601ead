"""From flags to a recipe: an effort fills in what was not given, and a flag that was given changes only itself."""

from dataclasses import dataclass, field
from typing import Literal

from .calibrate.patterns import Pattern
from .passes.errors import InputError
from .passes.recipe import MaskFrom, Recipe, Score, Update

Effort = Literal["fast", "balanced"]
BALANCED: Update = "admm-cg"


@dataclass(frozen=True)
class Flags:
    """What the command line said about pruning; None for flags that were not given."""

    effort: Effort | None = None
    score: Score | None = None
    ria_power: float = 0.5
    permute: Literal["fold", "none"] | None = None
    skip: tuple[str, ...] = field(default=())
    update: Update | None = None
    mask_from: MaskFrom | None = None
    damping: float | None = None


def effort_of(flags: Flags, *, onnx: bool) -> Effort:
    """The effort given, or the default: balanced, but fast for an ``.onnx`` file."""
    return flags.effort or ("fast" if onnx else "balanced")


def make_recipe(pattern: Pattern, flags: Flags, *, onnx: bool) -> Recipe:
    """The recipe for a traced model, or for one that is an ``.onnx`` file.

    Raises:
        InputError: a flag is out of range, has no effect beside the others, or wants more than can be had for an
            ``.onnx`` file, which is scored and masked and nothing else.
    """
    if flags.ria_power < 0:
        raise InputError(f"--ria-power {flags.ria_power:g} is negative; want 0 or more")
    if flags.damping is not None and not 0 <= flags.damping <= 1:
        raise InputError(f"--damping {flags.damping:g} is out of range; want 0 to 1")
    if onnx and flags.effort == "balanced":
        raise InputError("--effort balanced needs the traced model; an .onnx file is pruned with --effort fast")
    if onnx and flags.update not in (None, "none"):
        raise InputError(f"--update {flags.update} needs the traced model and cannot be had for an .onnx file")
    update = flags.update or ("none" if effort_of(flags, onnx=onnx) == "fast" else BALANCED)
    if update == "none":
        for flag, value in {"--mask-from": flags.mask_from, "--damping": flags.damping}.items():
            if value is not None:
                raise InputError(f"{flag} {value} has no effect without an update of the weights")
    if update == "cg" and flags.mask_from == "update":
        raise InputError("--update cg does not choose a mask; want --mask-from score, or leave it out")
    chooses = update not in ("none", "cg")
    return Recipe(
        pattern,
        flags.score or "ria",
        flags.ria_power,
        flags.permute or ("none" if onnx else "fold"),
        flags.skip,
        update,
        flags.mask_from or ("update" if chooses else "score"),
        flags.damping,
    )
