"""From flags to a recipe: an effort fills in what was not given, and a flag that was given changes only itself."""

from dataclasses import dataclass, field, replace
from typing import Literal

from .calibrate.besa import Learning
from .calibrate.choice import sparsities
from .calibrate.patterns import NM, Pattern, Unstructured
from .calibrate.rates import reachable
from .passes.dialect.storage import FP32, Storage
from .passes.errors import InputError
from .passes.given_masks import GivenMasks
from .passes.recipe import Distil, Hessians, MaskFrom, Moves, Quantise, Quantiser, Recipe, Score, Tune, Update

Allocate = Literal["none", "besa-row", "besa-layer", "besa-nm"]
Effort = Literal["fast", "balanced", "best"]
BALANCED: Update = "alps"


@dataclass(frozen=True)
class Flags:
    """What the command line said about pruning; None for flags that were not given."""

    effort: Effort | None = None
    score: Score | None = None
    ria_power: float | None = None
    permute: Literal["fold", "none"] | None = None
    skip: tuple[str, ...] = field(default=())
    update: Update | None = None
    mask_from: MaskFrom | None = None
    hessian: Hessians | None = None
    damping: float | None = None
    allocate: Allocate | None = None
    besa_reference: Literal["pruned", "dense"] | None = None
    besa_optimiser: Literal["adamw", "prodigy"] | None = None
    besa_logits: Literal["softmax", "sigmoid"] | None = None
    besa_rate_step: float | None = None
    besa_epochs: int | None = None
    besa_patterns: str | None = None
    given: GivenMasks | None = None
    tune: Literal["none", "halves", "block"] | None = None
    tune_epochs: int | None = None
    tune_lr: float | None = None
    distil: int | None = None
    distil_lr: float | None = None
    mask_moves: int | None = None
    mask_rank: Literal["magnitude", "fisher"] | None = None
    mask_pull: float | None = None
    quantise: Quantiser | None = None
    storage: Storage = FP32
    seed: int = 0
    inputs: bool = False
    """Whether there are calibration inputs, without which nothing is known of what an ``.onnx`` file's linears read."""


def effort_of(flags: Flags, *, onnx: bool) -> Effort:
    """The effort given, or the default: balanced, but fast for an ``.onnx`` file without calibration inputs."""
    return flags.effort or ("fast" if onnx and not flags.inputs else "balanced")


def make_recipe(pattern: Pattern | None, flags: Flags, *, onnx: bool) -> Recipe:
    """The recipe for a traced model, or for one that is an ``.onnx`` file.

    Without a pattern it is what the given masks make.

    Raises:
        InputError: a flag is out of range, has no effect beside the others, or wants more than can be had for an
            ``.onnx`` file: nothing is trained on it, and its channels stay where they are.
    """
    if flags.given is not None:
        _check_given(pattern, flags, onnx=onnx)
        pattern = pattern or flags.given.pattern
    assert pattern is not None
    if flags.ria_power is not None and not flags.ria_power >= 0:
        raise InputError(f"--ria-power {flags.ria_power:g} is negative; want 0 or more")
    if flags.damping is not None and not 0 <= flags.damping <= 1:
        raise InputError(f"--damping {flags.damping:g} is out of range; want 0 to 1")
    if onnx:
        _check_onnx(flags)
    if onnx and flags.tune not in (None, "none"):
        raise InputError(f"--tune {flags.tune} needs the traced model and cannot be had for an .onnx file")
    update = flags.update or ("none" if effort_of(flags, onnx=onnx) == "fast" else BALANCED)
    if update == "none":
        for flag, value in {"--mask-from": flags.mask_from, "--damping": flags.damping}.items():
            if value is not None:
                raise InputError(f"{flag} {value} has no effect without an update of the weights")
    if update == "cg" and flags.mask_from == "update":
        raise InputError("--update cg does not choose a mask; want --mask-from score, or leave it out")
    best = effort_of(flags, onnx=onnx) == "best" and isinstance(pattern, Unstructured) and flags.given is None
    allocation = _allocation(pattern, flags, flags.allocate or ("besa-row" if best else "none"), onnx=onnx)
    counts = allocation is None or allocation.per != "pattern"
    if not counts and flags.mask_from == "update":
        raise InputError("--mask-from update would undo --allocate besa-nm; want score, or leave it out")
    if allocation is not None and update == "sparsegpt" and flags.mask_from == "update":
        why = "--update sparsegpt chooses its mask over all rows, which undoes --allocate; want --mask-from score"
        raise InputError(why)
    score = flags.score or ("wanda" if best else "ria")
    choosing = ("admm", "admm-cg", "alps") + (("sparsegpt",) if allocation is None else ())
    chooses = update in choosing and flags.given is None and counts
    mask_from = flags.mask_from or ("update" if chooses else "score")
    permute = _permute(pattern, flags, onnx=onnx)
    if flags.ria_power is not None and score != "ria":
        raise InputError(f"--ria-power {flags.ria_power:g} has no effect with --score {score}")
    if mask_from == "update" and update != "none" and allocation is None:
        _check_score(flags, update, folds=permute == "fold")
    tune, distil = _tune(flags, onnx=onnx), _distil(flags, onnx=onnx)
    quantise = _quantise(flags, onnx=onnx, learns=bool(tune or distil or allocation))
    if distil is not None:
        moves = _moves(flags, on_grid=quantise is not None and quantise.method != "joint")
        distil = replace(distil, moves=moves)
    if flags.hessian is not None and update == "none" and (quantise is None or quantise.method == "rtn"):
        raise InputError(f"--hessian {flags.hessian} has no effect without an update of the weights or a sweep")
    return Recipe(
        pattern=pattern,
        score=score,
        ria_power=Recipe.ria_power if flags.ria_power is None else flags.ria_power,
        permute=permute,
        skip=flags.skip,
        allocation=allocation,
        update=update,
        mask_from=mask_from,
        hessian=flags.hessian or "attended",
        damping=flags.damping,
        given=flags.given,
        tune=tune,
        distil=distil,
        quantise=quantise,
    )


def _check_onnx(flags: Flags) -> None:
    """Refuse for an ``.onnx`` file what trains the model, and without inputs what weights are fitted to."""
    if flags.effort == "best":
        raise InputError("--effort best needs the traced model; an .onnx file takes --effort fast or balanced")
    fits = {
        "--effort balanced": flags.effort == "balanced",
        "--score hessian": flags.score == "hessian",
        f"--update {flags.update}": flags.update not in (None, "none"),
        "--quantise sweep": flags.quantise == "sweep",
    }
    for flag, given in fits.items():
        if given and not flags.inputs:
            why = (
                "goes by what the linears of an .onnx file read; give --calibration-inputs FOLDER or --calibration TEXT"
            )
            raise InputError(f"{flag} {why}")


def _permute(pattern: Pattern, flags: Flags, *, onnx: bool) -> Literal["fold", "none"]:
    """Orders are folded where they can help: in N:M patterns of traced models."""
    if flags.permute == "fold" and isinstance(pattern, Unstructured):
        raise InputError(
            "--permute fold has no effect with zeros anywhere, which no order of channels helps; want --nm"
        )
    return flags.permute or ("none" if onnx or flags.given or isinstance(pattern, Unstructured) else "fold")


def _check_score(flags: Flags, update: Update, *, folds: bool) -> None:
    """Refuse a score where the update chooses the mask, unless it was said that it is for the channel orders only."""
    given = {"--score": flags.score, "--ria-power": flags.ria_power}
    for flag, value in given.items():
        if value is None:
            continue
        if flags.mask_from != "update":
            orders = ", or --mask-from update to have it rank channel orders only" if folds else ""
            raise InputError(
                f"{flag} {value} does not choose what goes: --update {update} does; give --mask-from score to prune "
                f"by it{orders}"
            )
        if not folds:
            raise InputError(f"{flag} {value} has no effect with --mask-from update")


def _check_given(pattern: Pattern | None, flags: Flags, *, onnx: bool) -> None:
    """Refuse what given masks leave without effect, and what would not go with them."""
    if onnx:
        raise InputError("--mask is for the linears of a traced model and cannot be had for an .onnx file")
    if flags.permute == "fold":
        raise InputError("--permute fold would move the weights away from their --mask; leave it out")
    idle = {"--sparsity": isinstance(pattern, Unstructured), "--score": flags.score is not None}
    idle["--ria-power"] = flags.ria_power is not None
    idle[f"--allocate {flags.allocate}"] = flags.allocate not in (None, "none")
    idle["--mask-from update"] = flags.mask_from == "update"
    for flag, was_given in idle.items():
        if was_given:
            raise InputError(f"{flag} has no effect with --mask, which says what goes; leave one of them out")


def _tune(flags: Flags, *, onnx: bool) -> Tune | None:
    if flags.tune is None or flags.tune == "none":
        for flag, value in {"--tune-epochs": flags.tune_epochs, "--tune-lr": flags.tune_lr}.items():
            if value is not None:
                raise InputError(f"{flag} {value:g} has no effect without --tune halves or --tune block")
        return None
    if flags.tune_epochs is not None and flags.tune_epochs < 1:
        raise InputError(f"--tune-epochs {flags.tune_epochs} is too few; want 1 or more")
    if flags.tune_lr is not None and not 0 < flags.tune_lr <= 1:
        raise InputError(f"--tune-lr {flags.tune_lr:g} is out of range; want above 0, at most 1")
    return Tune(flags.tune, flags.tune_epochs or Tune.epochs, flags.tune_lr or Tune.rate, seed=flags.seed)


def _distil(flags: Flags, *, onnx: bool) -> Distil | None:
    if onnx and flags.distil:
        raise InputError(f"--distil {flags.distil} needs the traced model and cannot be had for an .onnx file")
    if flags.distil is not None and flags.distil < 0:
        raise InputError(f"--distil {flags.distil} is negative; want a number of epochs, or 0 for none")
    default = Distil.epochs if effort_of(flags, onnx=onnx) == "best" else 0
    epochs = default if flags.distil is None else flags.distil
    if not epochs:
        idle: dict[str, float | str | None] = {
            "--distil-lr": flags.distil_lr,
            "--mask-moves": flags.mask_moves or None,
            "--mask-rank": flags.mask_rank,
            "--mask-pull": flags.mask_pull,
        }
        for flag, value in idle.items():
            if value is not None:
                said = value if isinstance(value, str) else f"{value:g}"
                raise InputError(f"{flag} {said} has no effect without --distil EPOCHS")
        return None
    if flags.distil_lr is not None and not 0 < flags.distil_lr <= 1:
        raise InputError(f"--distil-lr {flags.distil_lr:g} is out of range; want above 0, at most 1")
    return Distil(epochs, flags.distil_lr, seed=flags.seed)


def _moves(flags: Flags, *, on_grid: bool) -> Moves | None:
    """How masks move while the weights are distilled, or None where they stay: given ones, and those on a grid.

    Raises:
        InputError: a flag is out of range, or nothing may move that a flag moves.
    """
    if flags.mask_moves is not None and flags.mask_moves < 0:
        raise InputError(f"--mask-moves {flags.mask_moves} is negative; want a number of steps, or 0 for none")
    if flags.mask_pull is not None and not 0 <= flags.mask_pull < 1:
        raise InputError(f"--mask-pull {flags.mask_pull:g} is out of range; want 0 to less than 1")
    still = "--mask, which says what goes" if flags.given else "--quantise rtn or sweep, whose grid is made for a mask"
    if flags.mask_moves and (flags.given or on_grid):
        raise InputError(f"--mask-moves {flags.mask_moves} cannot be had with {still}")
    if not flags.mask_moves:
        for flag, value in {"--mask-rank": flags.mask_rank, "--mask-pull": flags.mask_pull}.items():
            if value is not None:
                raise InputError(f"{flag} {value} has no effect where masks stay; want --mask-moves STEPS")
        return None
    pull = Moves.pull if flags.mask_pull is None else flags.mask_pull
    return Moves(flags.mask_moves, pull, flags.mask_rank or Moves.score)


def _quantise(flags: Flags, *, onnx: bool, learns: bool) -> Quantise | None:
    """How weights get onto their grid, or None where they are floats, or rounded when they are packed."""
    if not flags.storage.quantised:
        if flags.quantise is not None:
            raise InputError(f"--quantise {flags.quantise} has no effect without --dtype int8 or --dtype int4")
        return None
    usual: dict[Effort, Quantiser] = {"fast": "rtn", "balanced": "sweep", "best": "joint" if learns else "sweep"}
    if onnx and flags.quantise == "joint":
        raise InputError(
            "--quantise joint needs the traced model and cannot be had for an .onnx file; want sweep or rtn"
        )
    if onnx and (flags.quantise or usual[effort_of(flags, onnx=onnx)]) == "rtn":
        return None  # which packing does by itself
    if flags.quantise == "joint" and not learns:
        raise InputError("--quantise joint learns with --tune, --distil or --allocate; give one of them, or take sweep")
    return Quantise(flags.storage, flags.quantise or usual[effort_of(flags, onnx=onnx)])


def _allocation(pattern: Pattern, flags: Flags, allocate: Allocate, *, onnx: bool) -> Learning | None:
    """How rates are to be learned, or None where they are the same everywhere."""
    if allocate == "none":
        given = {
            "--besa-reference": flags.besa_reference,
            "--besa-optimiser": flags.besa_optimiser,
            "--besa-logits": flags.besa_logits,
            "--besa-rate-step": flags.besa_rate_step,
            "--besa-epochs": flags.besa_epochs,
            "--besa-patterns": flags.besa_patterns,
        }
        for flag, value in given.items():
            if value is not None:
                raise InputError(f"{flag} {value} has no effect without --allocate besa-row, besa-layer or besa-nm")
        return None
    if isinstance(pattern, NM):
        raise InputError(f"--allocate {allocate} wants --sparsity: --nm {pattern} prunes every row alike")
    if onnx:
        raise InputError(f"--allocate {allocate} needs the traced model and cannot be had for an .onnx file")
    if allocate == "besa-nm":
        for flag, value in {"--besa-logits": flags.besa_logits, "--besa-rate-step": flags.besa_rate_step}.items():
            if value is not None:
                raise InputError(f"{flag} {value} has no effect with --allocate besa-nm, which learns no rates")
    elif flags.besa_patterns is not None:
        raise InputError(f"--besa-patterns {flags.besa_patterns} has no effect without --allocate besa-nm")
    step = 0.01 if flags.besa_rate_step is None else flags.besa_rate_step
    if not 0.001 <= step <= 0.5 or abs(1 / step - round(1 / step)) > 1e-6:
        raise InputError(f"--besa-rate-step {step:g} wants a fraction like 0.01 of which 1 is a multiple")
    steps, bounded = round(1 / step), flags.besa_logits == "sigmoid"
    low, high = reachable(steps) if bounded else (0.0, 1.0)
    if not low < pattern.sparsity < high:
        raise InputError(f"--besa-logits sigmoid reaches rates from {low:.3f} to {high:.3f}, not {pattern.sparsity:g}")
    if flags.besa_epochs is not None and flags.besa_epochs < 1:
        raise InputError(f"--besa-epochs {flags.besa_epochs} is too small; want 1 or more")
    kinds: dict[str, Literal["row", "layer", "pattern"]] = {"besa-row": "row", "besa-layer": "layer"}
    per = kinds.get(allocate, "pattern")
    return Learning(
        per=per,
        reference=flags.besa_reference or ("dense" if per == "layer" else "pruned"),
        optimiser=flags.besa_optimiser or "adamw",
        width=None if bounded else 0.1,
        bounded=bounded,
        rate_steps=steps,
        epochs=flags.besa_epochs or 1,
        patterns=_patterns(flags.besa_patterns, pattern.sparsity) if per == "pattern" else Learning.patterns,
    )


def _patterns(text: str | None, sparsity: float) -> tuple[NM | None, ...]:
    """Read ``4:8,1:4,dense``."""
    patterns = Learning.patterns
    if text is not None:
        try:
            patterns = tuple(None if name == "dense" else NM.parse(name) for name in text.split(","))
        except ValueError as error:
            raise InputError(f"--besa-patterns wants names like 4:8,2:4,1:4,dense: {error}") from error
    if not 2 <= len(patterns) <= 8 or len(set(patterns)) < len(patterns):
        raise InputError(f"--besa-patterns {text} wants 2 to 8 different patterns")
    if sparsity > max(sparsities(patterns)):
        most = max(sparsities(patterns))
        raise InputError(f"--sparsity {sparsity:g} is out of reach: the sparsest of the patterns has {most:g}")
    return patterns
