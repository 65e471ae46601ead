"""Which linears stay dense, so that the model meets a budget of time or bytes with the least damage.

Nothing is believed that can be measured: the dense model is written and timed first, then the choice with weights that
are zeroed by magnitude, for speed and size depend on where zeros are allowed and on nothing else. Where it misses the
budget by more than 5 %, what linears gain is corrected by what was measured, and it is chosen again, twice at most.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibrate.budget import Form, choose
from .calibrate.masks import keep_mask
from .calibrate.patterns import NM, Pattern
from .passes.dialect import packed
from .passes.dialect.storage import Storage
from .passes.errors import InputError
from .passes.frontend.batches import Batch
from .passes.frontend.trace import Traced
from .passes.fx.canonical import canonicalise
from .passes.fx.embeddings import quantise_embeddings
from .passes.fx.linears import Linear
from .passes.fx.partition import Partition
from .passes.fx.rewrite import lower_linears
from .passes.lower import to_onnx
from .passes.mapped import mapped
from .passes.onnx.protos import data_files
from .passes.outputs import Output
from .passes.recipe import Recipe
from .passes.sensitivity import sensitivity
from .passes.skip import named_by
from .publish import PARTIAL
from .runtime.benchmark import compare_files
from .runtime.machine import Machine
from .runtime.session import open_session
from .settings import Budget, Console
from .target import Target

TRIES = 3
BATCHES = 8
"""How many calibration batches the damage is estimated from."""
REPEATS = 15


@dataclass(frozen=True)
class Group:
    """Linears of a block that read the same input, and so run as one op.

    Attributes:
        linears: of the block.
        damage: see ``sensitivity``, of all of them together.
        dense_seconds: predicted for this machine in the workload.
        sparse_seconds: the same with zeros.
        dense_bytes: in float32.
        sparse_bytes: as packed.
    """

    linears: tuple[Linear, ...]
    damage: float
    dense_seconds: float
    sparse_seconds: float
    dense_bytes: int
    sparse_bytes: int


@dataclass(frozen=True)
class Try:
    """One choice, and what came of it: predicted, and measured on a file of its zeros.

    Attributes:
        sparse: how many linears are sparse.
        damage: predicted, of all of them.
        predicted: the speed-up, or the fraction of bytes.
        measured: the same of the file.
    """

    sparse: int
    damage: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        budget: what was asked for.
        dense: module paths of the linears that stay dense, of those that could have been pruned.
        groups: all groups with their figures.
        sparse: for each group whether it is pruned.
        tries: every choice that was made, the last is what counts.
        dense_ms: of the workload, the dense file's median in the last try; 0 where nothing was timed, for a size.
        result_ms: likewise of the choice.
    """

    budget: Budget
    dense: tuple[str, ...]
    groups: tuple[Group, ...]
    sparse: tuple[bool, ...]
    tries: tuple[Try, ...]
    dense_ms: float
    result_ms: float

    def plain(self) -> dict[str, Any]:
        """As JSON-able values, for the report."""
        groups = [
            {
                "linears": [linear.path for linear in group.linears],
                "sparse": sparse,
                "damage": group.damage,
                "dense_ms": 1e3 * group.dense_seconds,
                "sparse_ms": 1e3 * group.sparse_seconds,
                "dense_bytes": group.dense_bytes,
                "sparse_bytes": group.sparse_bytes,
            }
            for group, sparse in zip(self.groups, self.sparse, strict=True)
        ]
        return {
            "budget": str(self.budget),
            "speedup": self.budget.speedup,
            "size": self.budget.size,
            "workload": str(self.budget.workload),
            "tries": [vars(each) for each in self.tries],
            "dense_ms": self.dense_ms,
            "result_ms": self.result_ms,
            "groups": groups,
        }


@dataclass(frozen=True)
class Trial:
    """What trial files are made from, and the budget they are held against.

    Attributes:
        traced: traces the model anew: writing a file changes the program.
        storage: of sparse weights.
        pattern: of their zeros.
        budget: what is asked for.
    """

    traced: Callable[[], Traced]
    storage: Storage
    pattern: Pattern
    budget: Budget

    def write(self, path: Path, linears: Sequence[Linear]) -> None:
        """The model in which some linears have their smallest weights zeroed; none: the dense float32 model."""
        traced = self.traced()
        canonicalise(traced.program)
        state, patterns = traced.program.state_dict, {linear.weight: self.pattern for linear in linears}
        for key in patterns:
            weight = state[key].detach()
            kept = mapped(weight * keep_mask(weight.abs(), self.pattern, "row"))
            state[key] = torch.nn.Parameter(kept, requires_grad=False)
        lower_linears(traced.program, storage=self.storage, patterns=patterns, sparse=bool(linears))
        if linears and self.storage.quantised:
            quantise_embeddings(traced.program)
        to_onnx(traced, path, metadata={})


def choose_linears(
    trial: Trial,
    recipe: Recipe,
    parts: Partition,
    params: Mapping[str, Tensor],
    batches: Sequence[Batch],
    target: Target,
    machine: Machine,
    *,
    output: Output,
    seed: int,
    console: Console,
) -> Choice:
    """Choose which linears are pruned.

    Args:
        trial: how trial files are made.
        recipe: what it leaves dense (``skip``) stays dense.
        parts: the model.
        params: its dense weights by key.
        batches: calibration batches.
        target: beside which trial files are written, and removed again.
        machine: predicts the time of ops.
        output: what the model's first output is.
        seed: of the tokens that the damage is estimated on.
        console: where to tell what happens.

    Raises:
        InputError: nothing can be pruned, the model cannot run the workload, or the budget cannot be met: then the
            nearest that can be is named.
    """
    allowed = [
        [linear for linear in part.linears if not any(named_by(glob, linear.path) for glob in recipe.skip)]
        for part in parts.blocks
    ]
    found = sensitivity(
        parts, params, batches[:BATCHES], recipe.pattern, output=output, seed=seed, progress=console.progress
    )
    groups = _groups(trial, allowed, found, machine)
    if not groups:
        raise InputError(f"a budget wants linears that can be pruned to {recipe.pattern}, and there is none")
    stage = target.out.with_name(f".{target.out.name}.{secrets.token_hex(4)}{PARTIAL}")
    files = Target(target.out, target.folder, target.overwrite, stage)
    with files.guarded():
        files.open()
        console.progress("writing the dense model", 0, 0)
        trial.write(stage / "dense.onnx", [])
        return _search(trial, groups, stage, console)


def _groups(
    trial: Trial, blocks: Sequence[Sequence[Linear]], damage: Mapping[str, float], machine: Machine
) -> list[Group]:
    """The linears of every block that can be pruned, those that read the same input together."""
    workload = trial.budget.workload
    tokens = (workload.tokens or 1) * workload.batch
    dense, sparse = machine.dense(), machine.sparse(trial.pattern, trial.storage)
    density = trial.pattern.n / trial.pattern.m if isinstance(trial.pattern, NM) else 1 - trial.pattern.sparsity
    sizes: dict[tuple[int, int], int] = {}
    groups = []
    for block in blocks:
        together: dict[str, list[Linear]] = {}
        for linear in block:
            if linear.path in damage:
                together.setdefault(linear.input, []).append(linear)
        for linears in together.values():
            rows, columns = sum(linear.out_features for linear in linears), linears[0].in_features
            if (rows, columns) not in sizes:
                sizes[rows, columns] = _packed_bytes(trial, rows, columns)
            groups.append(
                Group(
                    linears=tuple(linears),
                    damage=sum(damage[linear.path] for linear in linears),
                    dense_seconds=dense.seconds(rows, columns, 1.0, tokens),
                    sparse_seconds=sparse.seconds(rows, columns, density, tokens),
                    dense_bytes=rows * columns * 4,
                    sparse_bytes=sizes[rows, columns],
                )
            )
    return groups


def _packed_bytes(trial: Trial, rows: int, columns: int) -> int:
    """What a weight of this size takes: packed, a random one, for the values do not matter."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return packed.pack(weight * keep_mask(weight.abs(), trial.pattern, "row"), trial.pattern, trial.storage).nbytes


@dataclass(frozen=True)
class Scale:
    """What files have told so far.

    Attributes:
        worth: seconds that a file gained over those that were predicted.
        rest: bytes of a file besides the weights of the groups.
    """

    worth: float
    rest: int


def _search(trial: Trial, groups: Sequence[Group], stage: Path, console: Console) -> Choice:
    """Choose, measure and choose again."""
    budget, dense = trial.budget, stage / "dense.onnx"
    dense_ms, _, _ = _timed(dense, dense, budget)
    dense_bytes = _size(dense)
    scale = Scale(1.0, dense_bytes - sum(group.dense_bytes for group in groups))
    tries: list[Try] = []
    while True:
        console.progress(f"choosing, try {len(tries) + 1}", 0, 0)
        sparse, possible = _pick(groups, budget, scale, dense_ms=dense_ms, dense_bytes=dense_bytes)
        linears = [linear for group, its in zip(groups, sparse, strict=True) if its for linear in group.linears]
        file = stage / f"try{len(tries)}.onnx"
        trial.write(file, linears)
        dense_ms, result_ms, ratio = _timed(file, dense, budget)
        nbytes = _size(file)
        for each in (file, *data_files(file)):
            each.unlink()
        chosen = [group for group, its in zip(groups, sparse, strict=True) if its]
        saved = 1e3 * sum(group.dense_seconds - group.sparse_seconds for group in chosen)
        stored = sum(g.sparse_bytes if its else g.dense_bytes for g, its in zip(groups, sparse, strict=True))
        predicted, measured = (
            (dense_ms / max(dense_ms - scale.worth * saved, 1e-3), ratio)
            if budget.speedup
            else ((stored + scale.rest) / dense_bytes, nbytes / dense_bytes)
        )
        tries.append(Try(len(linears), sum(group.damage for group in chosen), predicted, measured))
        met, near = budget.judge(measured)
        if not possible and not met:
            raise InputError(_out_of_reach(budget, trial.pattern, measured))
        if near or not possible or len(tries) == TRIES:
            if not met:
                console.note(f"the budget of {budget} is missed: {measured:.3g} was measured after {TRIES} choices")
            left = [linear.path for g, its in zip(groups, sparse, strict=True) if not its for linear in g.linears]
            return Choice(budget, tuple(left), tuple(groups), sparse, tuple(tries), dense_ms, result_ms)
        gained = dense_ms * (1 - 1 / ratio)
        if budget.speedup and (gained <= 0 or saved <= 0):
            raise InputError(_out_of_reach(budget, trial.pattern, measured))
        scale = Scale(gained / saved if budget.speedup else scale.worth, nbytes - stored)


def _timed(file: Path, dense: Path, budget: Budget) -> tuple[float, float, float]:
    """Milliseconds of the dense file and of another in turns, and the speed-up; a size wants no clock."""
    if not budget.speedup:
        return 0.0, 0.0, 1.0
    (row,) = compare_files(file, dense, budget.workload.feed(open_session(dense)), repeats=REPEATS)
    assert row.against is not None
    assert row.ratio is not None
    return row.against.p50, row.model.p50, row.ratio


def _pick(
    groups: Sequence[Group], budget: Budget, scale: Scale, *, dense_ms: float, dense_bytes: int
) -> tuple[tuple[bool, ...], bool]:
    """Which groups are sparse, and whether that is expected to be enough; where nothing is, all that gain are."""
    forms = [
        [Form(g.dense_seconds, g.dense_bytes, 0.0), Form(g.sparse_seconds, g.sparse_bytes, g.damage)] for g in groups
    ]
    if budget.speedup:
        gain = dense_ms / 1e3 * (1 - 1 / budget.speedup) / scale.worth
        found = choose(forms, seconds=sum(g.dense_seconds for g in groups) - gain)
        most = tuple(g.sparse_seconds < g.dense_seconds for g in groups)
    else:
        assert budget.size is not None
        found = choose(forms, nbytes=budget.size * dense_bytes - scale.rest)
        most = tuple(g.sparse_bytes < g.dense_bytes for g in groups)
    return (most, False) if found is None else (tuple(map(bool, found)), True)


def _size(file: Path) -> int:
    return sum(part.stat().st_size for part in (file, *data_files(file)))


def _out_of_reach(budget: Budget, pattern: Pattern, measured: float) -> str:
    nearest = f"{measured:.2f}x" if budget.speedup else f"{measured:.2f} of the bytes"
    return f"a budget of {budget} is out of reach: with every linear that gains pruned to {pattern}, it is {nearest}"
