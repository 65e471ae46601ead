"""Everything that is asked of the compiler: plain data, printed before work starts and stored with the result."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .calibrate.patterns import NM, Pattern, Unstructured
from .calibrate.search import Goal
from .calibrate.update import DAMPING
from .passes.dialect.storage import FP32, Storage
from .passes.distil import ENCODER_RATE, RATE
from .passes.errors import InputError
from .passes.recipe import Recipe
from .plan import EngineSettings
from .runtime.workload import Workload

USUAL = f"{RATE:g}, of an encoder {ENCODER_RATE:g}"
"""Learning rate of distillation where none is given."""


@dataclass(frozen=True)
class Calibration:
    """What the activations are observed on.

    Attributes:
        text: ``self``, or a text file; not used when ``inputs`` is given.
        inputs: folder of ``.npz`` batches.
        samples: how many windows; None for 128 of a file, 32 of the model's own text, every ``.npz`` batch.
        length: tokens in a window; None for 2,048 of a file, 512 of the model's own text.
        seed: of the model's own text, and of the tokens that verify the file.
        tokens: how many tokens, in place of how many windows; the last window may be more than that.
    """

    text: str = "self"
    inputs: Path | None = None
    samples: int | None = None
    length: int | None = None
    seed: int = 0
    tokens: int | None = None

    def windows(self, length: int, usual: int) -> int:
        """How many windows of so many tokens that is, and ``usual`` where nothing is said."""
        return -(-self.tokens // length) if self.tokens else self.samples or usual


@dataclass(frozen=True)
class Budget:
    """What the result has to meet; one of the three is given, or none where only the frontier is asked for.

    Attributes:
        speedup: of the workload, over the dense float32 file.
        size: bytes of the file, as a fraction of the dense float32 file.
        loss: by what fraction the perplexity may grow; then the fastest is looked for.
        workload: what is timed; None where nothing is, for a size.
        pattern: whether the user said which zeros are to be made; else every form that has a kernel is looked at.
        storage: likewise of the dtype; None for all.
    """

    speedup: float | None
    size: float | None
    workload: Workload | None
    loss: float | None = None
    pattern: bool = True
    storage: Storage | None = None

    def __str__(self) -> str:
        if self.speedup:
            return f"{self.speedup:g}x at {self.workload}"
        if self.size:
            return f"{self.size:g} of the bytes"
        return f"{100 * self.loss:g} % of perplexity at {self.workload}" if self.loss else f"any at {self.workload}"

    @property
    def goal(self) -> Goal:
        """What the forms are chosen for. A model that is changed to d nats a token has e^d times the perplexity."""
        return Goal(self.speedup, self.size, math.log1p(self.loss) if self.loss else None)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out; printed before work starts and stored in the file and the report.

    Attributes:
        recipe: how to prune, or None to prune nothing.
        calibration: what to observe.
        storage: of packed weights.
        ops: ``sparse`` lowers sparse weights to our ops; ``standard`` writes plain MatMul with zeros.
        lower_for: leave a weight dense where this machine would run it slower sparse, in calls of so many tokens;
            None lowers every weight that gets smaller.
        evaluate: text file to measure perplexity on before and after, or None.
        window: tokens in an evaluation window.
        windows: how many evaluation windows at most; None for all.
        engine: what a TensorRT engine has to take; None where none is asked for.
        bos: begin every window and problem with the token that the tokenizer puts in front of a text.
        cache: ``joined`` returns a longer KV cache; ``in-place`` writes into it, by an op of ONNX Runtime's own.
        budget: what decides which linears stay dense; None prunes all that the recipe does not skip.
        alternatives: make and measure what else the model could be.
        workload: what those are timed in; None for the budget's, or what suits the model.
    """

    recipe: Recipe | None
    calibration: Calibration = Calibration()
    storage: Storage = FP32
    ops: Literal["sparse", "standard"] = "sparse"
    lower_for: int | None = None
    evaluate: Path | None = None
    window: int = 2048
    windows: int | None = None
    engine: EngineSettings | None = None
    bos: bool = True
    budget: Budget | None = None
    cache: Literal["joined", "in-place"] = "joined"
    alternatives: bool = False
    workload: Workload | None = None


@dataclass(frozen=True)
class Console:
    """Where the compiler tells what it does; the default says nothing."""

    note: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None


SILENT = Console()


def make_budget(
    speedup: float | None,
    size: float | None,
    loss: str | None,
    workload: str | None,
    *,
    dry: bool = False,
    compared: bool = False,
) -> Budget | None:
    """What ``--speedup``, ``--bytes``, ``--max-loss`` and ``--workload`` ask for, or None without the first three.

    Args:
        speedup: above 1.
        size: a fraction.
        loss: a fraction, or percent.
        workload: as `Workload.parse` takes it.
        dry: whether the frontier is asked for, which needs none of the three.
        compared: whether alternatives are, which are timed in the workload too.

    Raises:
        InputError: several are given, one is out of range, or the workload is none or has no effect.
    """
    told = {"--speedup": speedup, "--bytes": size, "--max-loss": loss}
    given = [
        f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}" for flag, value in told.items() if value
    ]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} were both given; want at most one of them")
    if workload is not None and speedup is None and loss is None and not (dry or compared):
        raise InputError(
            f"--workload {workload} has no effect without --speedup, --max-loss, --dry-run or --alternatives"
        )
    if speedup is not None and not 1 < speedup <= 100:
        raise InputError(f"--speedup {speedup:g} is out of range; want above 1, at most 100")
    if size is not None and not 0 < size < 1:
        raise InputError(f"--bytes {size:g} is out of range; want a fraction between 0 and 1")
    if speedup is None and size is None and loss is None and not dry:
        return None
    timed = None if size is not None and not dry else Workload.parse(workload or "decode:64")
    return Budget(speedup, size, timed, None if loss is None else _fraction(loss))


def _fraction(text: str) -> float:
    """Read ``2%`` or ``0.02``."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise InputError(
            f"--max-loss {text} is out of range; want a part of the perplexity above 0, such as 2% or 0.02"
        )
    return value


def check_budget(budget: Budget, recipe: Recipe | None, unsuited: Mapping[str, bool], *, evaluated: bool) -> None:
    """Refuse a budget beside what leaves nothing to choose, or cannot be measured.

    Args:
        budget: what is asked for.
        recipe: what it chooses the linears for.
        unsuited: whether each of these is there, by what it is called.
        evaluated: whether there is a text to evaluate on.

    Raises:
        InputError: something is.
    """
    if recipe is not None and recipe.given is not None:
        raise InputError("a budget chooses what is pruned, and --mask says it; leave one of them out")
    if recipe is not None and recipe.allocation is not None and recipe.allocation.per == "pattern":
        raise InputError("a budget chooses for one pattern, and --allocate besa-nm learns several")
    if budget.loss is not None and not evaluated:
        raise InputError("--max-loss is held against a measured perplexity; want --eval FILE beside it")
    for what, there in unsuited.items():
        if there:
            raise InputError(f"a budget cannot be had with {what}")


def parse_pattern(nm: str | None, sparsity: float | None) -> Pattern | None:
    """The pattern that ``--nm`` or ``--sparsity`` names, or None with neither.

    Raises:
        InputError: both are given, or one is out of range.
    """
    if nm is not None and sparsity is not None:
        raise InputError(f"--nm {nm} and --sparsity {sparsity:g} were both given; want at most one of them")
    try:
        return NM.parse(nm) if nm is not None else Unstructured(sparsity) if sparsity is not None else None
    except ValueError as error:
        raise InputError(str(error)) from error


def _damping(recipe: Recipe) -> float | None:
    if recipe.update == "none" or recipe.damping is not None:
        return recipe.damping
    return DAMPING[recipe.update]


def _quantiser(settings: Settings) -> str | None:
    """How weights are quantised: as the recipe says, else to nearest where they are packed."""
    if settings.recipe and settings.recipe.quantise:
        return settings.recipe.quantise.method
    return "rtn" if settings.storage.quantised and settings.ops == "sparse" else None


def _free(settings: Settings) -> bool:
    """Whether a budget chooses how weights are stored."""
    return settings.budget is not None and not settings.budget.pattern and settings.budget.storage is None


def _pattern(settings: Settings) -> str | None:
    if settings.budget is not None and not settings.budget.pattern:
        return "as the budget says"
    return str(settings.recipe.pattern) if settings.recipe else None


def plain(settings: Settings) -> dict[str, Any]:
    """The settings as JSON-able values."""
    recipe = settings.recipe
    return {
        "pattern": _pattern(settings),
        "score": recipe.score if recipe else None,
        "ria_power": recipe.ria_power if recipe else None,
        "permute": recipe.permute if recipe else None,
        "skip": list(recipe.skip) if recipe else [],
        "mask": str(recipe.given.file) if recipe and recipe.given else None,
        "allocation": asdict(recipe.allocation) if recipe and recipe.allocation else None,
        "update": recipe.update if recipe else None,
        "mask_from": recipe.mask_from if recipe and recipe.update != "none" else None,
        "hessian": recipe.hessian if recipe and recipe.update != "none" else None,
        "damping": _damping(recipe) if recipe else None,
        "tune": recipe.tune.scope if recipe and recipe.tune else None,
        "tune_epochs": recipe.tune.epochs if recipe and recipe.tune else None,
        "tune_lr": recipe.tune.rate if recipe and recipe.tune else None,
        "distil": recipe.distil.epochs if recipe and recipe.distil else None,
        "distil_lr": (recipe.distil.rate or USUAL) if recipe and recipe.distil else None,
        "mask_moves": asdict(recipe.distil.moves) if recipe and recipe.distil and recipe.distil.moves else None,
        "quantise": _quantiser(settings),
        "calibration": str(settings.calibration.inputs or settings.calibration.text),
        "samples": settings.calibration.samples,
        "tokens": settings.calibration.tokens,
        "seq_len": settings.calibration.length,
        "seed": settings.calibration.seed,
        "threads": torch.get_num_threads() if recipe else None,  # the bits of a whole run depend on it
        "bos": "where the tokenizer puts one" if settings.bos else "none",
        "dtype": settings.storage.kind if not _free(settings) else "as the budget says",
        "group": settings.storage.group or None if not _free(settings) else None,
        "ops": settings.ops if settings.engine is None else "what TensorRT takes",
        "lower": "always" if settings.lower_for is None else f"auto, for {settings.lower_for} tokens a call",
        "budget": str(settings.budget) if settings.budget else None,
        "cache": settings.cache if settings.cache != "joined" else None,
        **(settings.engine.plain() if settings.engine else {}),
    }
