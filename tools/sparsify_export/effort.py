"""From flags to a recipe: an effort fills in what was not given, and a flag that was given changes only itself."""

from dataclasses import dataclass, field
from typing import Literal

from .calibrate.patterns import Pattern, Unstructured
from .passes.errors import InputError
from .passes.given_masks import GivenMasks
from .passes.recipe import MaskFrom, Recipe, Score, Tune, Update

Effort = Literal["fast", "balanced", "best"]
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
    given: GivenMasks | None = None
    tune: Literal["none", "halves", "block"] | None = None
    tune_epochs: int | None = None
    tune_lr: float | None = None


def effort_of(flags: Flags, *, onnx: bool) -> Effort:
    """The effort given, or the default: balanced, but fast for an ``.onnx`` file."""
    return flags.effort or ("fast" if onnx else "balanced")


def make_recipe(pattern: Pattern | None, flags: Flags, *, onnx: bool) -> Recipe:
    """The recipe for a traced model, or for one that is an ``.onnx`` file.

    Without a pattern it is what the given masks make.

    Raises:
        InputError: a flag is out of range, has no effect beside the others, or wants more than can be had for an
            ``.onnx`` file, which is scored and masked and nothing else.
    """
    if flags.given is not None:
        _check_given(pattern, flags, onnx=onnx)
        pattern = pattern or flags.given.pattern
    assert pattern is not None
    if flags.ria_power < 0:
        raise InputError(f"--ria-power {flags.ria_power:g} is negative; want 0 or more")
    if flags.damping is not None and not 0 <= flags.damping <= 1:
        raise InputError(f"--damping {flags.damping:g} is out of range; want 0 to 1")
    if onnx and flags.effort in ("balanced", "best"):
        raise InputError(f"--effort {flags.effort} needs the traced model; an .onnx file is pruned with --effort fast")
    if onnx and flags.update not in (None, "none"):
        raise InputError(f"--update {flags.update} needs the traced model and cannot be had for an .onnx file")
    if onnx and flags.tune not in (None, "none"):
        raise InputError(f"--tune {flags.tune} needs the traced model and cannot be had for an .onnx file")
    update = flags.update or ("none" if effort_of(flags, onnx=onnx) == "fast" else BALANCED)
    if update == "none":
        for flag, value in {"--mask-from": flags.mask_from, "--damping": flags.damping}.items():
            if value is not None:
                raise InputError(f"{flag} {value} has no effect without an update of the weights")
    if update == "cg" and flags.mask_from == "update":
        raise InputError("--update cg does not choose a mask; want --mask-from score, or leave it out")
    chooses = update not in ("none", "cg") and flags.given is None
    return Recipe(
        pattern=pattern,
        score=flags.score or "ria",
        ria_power=flags.ria_power,
        permute=flags.permute or ("none" if onnx or flags.given else "fold"),
        skip=flags.skip,
        update=update,
        mask_from=flags.mask_from or ("update" if chooses else "score"),
        damping=flags.damping,
        given=flags.given,
        tune=_tune(flags, onnx=onnx),
    )


def _check_given(pattern: Pattern | None, flags: Flags, *, onnx: bool) -> None:
    """Refuse what given masks leave without effect, and what would not go with them."""
    if onnx:
        raise InputError("--mask is for the linears of a traced model and cannot be had for an .onnx file")
    if flags.permute == "fold":
        raise InputError("--permute fold would move the weights away from their --mask; leave it out")
    idle = {"--sparsity": isinstance(pattern, Unstructured), "--score": flags.score is not None}
    idle["--mask-from update"] = flags.mask_from == "update"
    for flag, was_given in idle.items():
        if was_given:
            raise InputError(f"{flag} has no effect with --mask, which says what goes; leave one of them out")


def _tune(flags: Flags, *, onnx: bool) -> Tune | None:
    scope = flags.tune or ("halves" if effort_of(flags, onnx=onnx) == "best" else "none")
    if scope == "none":
        for flag, value in {"--tune-epochs": flags.tune_epochs, "--tune-lr": flags.tune_lr}.items():
            if value is not None:
                raise InputError(f"{flag} {value:g} has no effect without --tune halves or --tune block")
        return None
    if flags.tune_epochs is not None and flags.tune_epochs < 1:
        raise InputError(f"--tune-epochs {flags.tune_epochs} is too few; want 1 or more")
    if flags.tune_lr is not None and not 0 < flags.tune_lr <= 1:
        raise InputError(f"--tune-lr {flags.tune_lr:g} is out of range; want above 0, at most 1")
    return Tune(scope, flags.tune_epochs or Tune.epochs, flags.tune_lr or Tune.rate)
