"""What pruning is asked for, and what it reports: plain data between the command line, the pipeline and the report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from ..calibrate.besa import Learning
from ..calibrate.patterns import Pattern
from .dialect.storage import Storage
from .form import Form
from .given_masks import GivenMasks

Score = Literal["ria", "wanda", "magnitude", "hessian"]
Update = Literal["none", "sparsegpt", "admm", "cg", "admm-cg", "alps"]
MaskFrom = Literal["update", "score"]
Quantiser = Literal["rtn", "sweep", "joint"]
Hessians = Literal["inputs", "attended"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
Note = Callable[[str], None]
"""Called with a sentence that the user should read."""


@dataclass(frozen=True)
class Tune:
    """How to fine-tune the surviving weights of every block.

    Attributes:
        scope: the halves of a block one after the other, or the whole block at once.
        epochs: passes over the calibration batches at most.
        rate: peak learning rate; a step of so much moves the output by about this fraction of the error there is.
        tokens_per_step: batches are gathered until a step of the optimiser has seen so many tokens.
        seed: of the order of the batches.
    """

    scope: Literal["halves", "block"] = "halves"
    epochs: int = 4
    rate: float = 0.08
    tokens_per_step: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Moves:
    """How masks move while weights are distilled; they stand still in the last third of the steps.

    Attributes:
        every: steps of the optimiser between two choices.
        pull: by what fraction a step at the peak learning rate shrinks what is behind a zero (SR-STE).
        score: what ranks the weights: their magnitude, or that times the root of Adam's second moment.
    """

    every: int = 8
    pull: float = 0.0
    score: Literal["magnitude", "fisher"] = "magnitude"


@dataclass(frozen=True)
class Distil:
    """How to train the surviving weights of all blocks together, after the last one is pruned.

    Attributes:
        epochs: passes over the calibration batches.
        rate: peak learning rate, as a fraction of the root mean square of each weight's non-zeros; on a grid
            half of it. None for the usual one, which is lower for encoders (`distil.RATE`).
        tokens_per_step: batches are gathered until a step of the optimiser has seen so many tokens.
        seed: of the order of the batches.
        moves: how masks move meanwhile, or None where zeros stay.
    """

    epochs: int = 3
    rate: float | None = None
    tokens_per_step: int = 1024
    seed: int = 0
    moves: Moves | None = None


@dataclass(frozen=True)
class Quantise:
    """How the pruned weights get onto the grid that they are stored on.

    Attributes:
        storage: int8 or int4.
        method: every weight to the nearest; a ``sweep`` that hands errors on to other weights and then fits scales and
            codes to each other; or ``joint``, the sweep, with clipping strengths learned together with BESA's rates,
            and trained together with the weights. That is done block by block; but weights that are distilled are
            trained as floats first, and joint sweeps them when that is done.
    """

    storage: Storage
    method: Quantiser = "sweep"


@dataclass(frozen=True)
class Recipe:
    """How to prune.

    Attributes:
        pattern: the zeros to make.
        score: which score ranks the weights.
        ria_power: exponent of the activation norms in RIA.
        permute: fold channel orders where the graph allows it (N:M only), or not at all.
        skip: glob patterns of module paths that stay dense.
        budgeted: module paths of linears that a budget of time or bytes leaves dense.
        forms: what a budget made of the others, by module path; those without one get ``pattern``.
        allocation: how BESA learns what each row loses (unstructured only), or None for the same rate everywhere.
        update: how the surviving weights make up for those that are gone.
        mask_from: whether the update chooses the mask as it goes, or takes that of the score. Without an update,
            and with ``cg``, which wants a mask, it is ``score``. With an allocation ``update`` chooses what every row
            loses, as much as was learned: for ``admm``, ``admm-cg`` and ``alps``, where no patterns are learned.
        hessian: what updates and quantisers fit a linear to: the tokens that it reads, or, where attention averages
            its outputs over tokens, what attention makes of those (`fx.attended`).
        damping: added to the diagonal of the Hessian, as a fraction of its mean; None for the update's own.
        given: masks to use as they are, instead of those that the score would make; linears without one stay dense.
            They are for the order of channels that the model has and for no other, so ``permute`` must be ``none``
            and ``mask_from`` ``score``.
        tune: how the surviving weights are fine-tuned after that, or None.
        distil: how they are trained once more when all blocks are pruned, or None.
        quantise: how they are quantised, or None for weights that are stored as floats or are rounded when packed.

    Raises:
        ValueError: the update would choose a mask that undoes the allocation, or forms come with rates or masks.
    """

    pattern: Pattern
    score: Score = "ria"
    ria_power: float = 0.5
    permute: Literal["fold", "none"] = "fold"
    skip: tuple[str, ...] = ()
    budgeted: tuple[str, ...] = ()
    forms: tuple[tuple[str, Form], ...] = ()
    allocation: Learning | None = None
    update: Update = "none"
    mask_from: MaskFrom = "score"
    hessian: Hessians = "attended"
    damping: float | None = None
    given: GivenMasks | None = field(default=None, compare=False)
    tune: Tune | None = None
    distil: Distil | None = None
    quantise: Quantise | None = None

    def __post_init__(self) -> None:
        if self.forms and (self.allocation is not None or self.given is not None):
            raise ValueError("forms were chosen, so neither rates nor masks can be")
        if self.allocation is None or self.mask_from == "score" or self.update == "none":
            return
        if self.allocation.per == "pattern" or self.update == "sparsegpt":
            undone = "patterns" if self.allocation.per == "pattern" else "rates"
            raise ValueError(f"update {self.update} with mask_from update undoes the {undone} learned; want score")


@dataclass(frozen=True)
class FoldReport:
    """One channel order that was folded: what it moved and what it gained."""

    name: str
    channels: int
    retained_before: float
    retained_after: float


@dataclass(frozen=True)
class LinearReport:
    """What became of one linear inside a block.

    Attributes:
        path: module path.
        shape: ``(out_features, in_features)``.
        pattern: the pattern made, or None if it was left dense.
        reason: why it was left dense; "" if it was pruned.
        retained_before: retained score with the channels in their original order.
        retained_after: retained score as pruned.
        sparsity: fraction of zeros as counted.
        error_before: ``tr((W - W0) H (W - W0)^T) / tr(W0 H W0^T)`` with the original weights under the score's mask;
            None without an update.
        error_after: the same with the weights as pruned.
        refused: why its update was not taken, so that it has the original weights under the score's mask, or was taken
            with more damping only; "" where all is well.
        directions: how many directions its inputs have been seen in, of in_features; None where that is not known.
        quantiser: how it was quantised; None where it was not.
        error_quantised: the same error with the weights as quantised; None where the Hessian is not known. Where they
            were distilled before, W0 is what that left.
    """

    path: str
    shape: tuple[int, int]
    pattern: str | None
    reason: str
    retained_before: float | None = None
    retained_after: float | None = None
    sparsity: float = 0.0
    error_before: float | None = None
    error_after: float | None = None
    refused: str = ""
    directions: int | None = None
    quantiser: Quantiser | None = None
    error_quantised: float | None = None


@dataclass(frozen=True)
class TuneReport:
    """What fine-tuning made of half a block.

    Attributes:
        linears: module paths of what was trained.
        before: squared error over the target's energy on the held-out batches, before.
        after: the same with the weights that were kept.
        epochs: passes over the batches until nothing more was gained.
    """

    linears: tuple[str, ...]
    before: float
    after: float
    epochs: int


@dataclass(frozen=True)
class DistilReport:
    """What training all blocks together made of the model.

    Attributes:
        before: loss on the held-out batches, before: nats a token, or squared error over the target's energy.
        after: the same with the weights that were kept.
        epochs: passes over the batches.
        moved: fraction of the kept weights that were pruned before; None where zeros stayed.
    """

    before: float
    after: float
    epochs: int
    moved: float | None = None


@dataclass(frozen=True)
class BlockReport:
    """One block: its linears, its folds, and how far its output moved.

    Attributes:
        error: ``||pruned - dense|| / ||dense||`` of the block's output, both on the pruned path's inputs.
        tuned: what fine-tuning made of each half.
    """

    path: str
    linears: tuple[LinearReport, ...]
    folds: tuple[FoldReport, ...]
    error: float
    tuned: tuple[TuneReport, ...] = ()


@dataclass
class Timings:
    """Seconds spent in each stage of pruning."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
