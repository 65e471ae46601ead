"""Which form every linear gets, so that the model meets a budget of time, bytes or loss.

Nothing is believed that can be measured: the dense model is written and timed first, then a file of the choice. Where
that misses the budget by more than 5 %, what linears gain is corrected, and it is chosen again, twice at most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from torch import Tensor

from .calibrate.budget import Option
from .calibrate.patterns import NM, Pattern, Unstructured
from .calibrate.search import Goal, Measured, OutOfReachError, Try, search
from .passes.dialect.storage import FP32, Storage
from .passes.errors import InputError
from .passes.form import Form
from .passes.frontend.batches import Batch
from .passes.fx.linears import Linear
from .passes.fx.partition import Partition
from .passes.outputs import Output
from .passes.recipe import Recipe
from .passes.sensitivity import Site, Witness, witness
from .passes.skip import named_by
from .runtime.machine import Machine
from .runtime.trial import Trials
from .runtime.workload import Workload
from .settings import Budget, Console

TEXTS = 8
"""How many calibration texts the damage is estimated from."""
PATTERNS: tuple[Pattern, ...] = (NM(2, 4), NM(4, 8), NM(6, 8), NM(8, 16), *map(Unstructured, (0.3, 0.5, 0.7, 0.9)))
STORAGES = (FP32, Storage("bf16"), Storage("int8"), Storage("int4", 32))
SURELY = 1.25
"""By what factor a form must be slower than one that cannot hurt more, on the size with most weights, not to be timed
on the others."""


@dataclass(frozen=True)
class Group:
    """Linears that get one form: those that run as one op since they read the same, and those that share a weight.

    Attributes:
        ops: for each op its linears and where they are.
        forms: that it may have; the first is dense.
        options: the figures of each form.
    """

    ops: tuple[tuple[tuple[Site, Linear], ...], ...]
    forms: tuple[Form, ...]
    options: tuple[Option, ...]

    @property
    def weights(self) -> dict[str, Linear]:
        """One linear of every weight, by its key."""
        return {linear.weight: linear for op in self.ops for _, linear in op}

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the linears; one that runs at several places is there once."""
        return tuple(dict.fromkeys(linear.path for op in self.ops for _, linear in op))


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        budget: what was asked for.
        groups: all groups with their figures.
        dense: the dense file.
        tries: every choice that was made, the last is what counts.
        losses: by what part the perplexity grew with every choice, where a loss is to be held.
    """

    budget: Budget
    groups: tuple[Group, ...]
    dense: Measured
    tries: tuple[Try, ...]
    losses: tuple[float, ...] = ()

    @property
    def forms(self) -> tuple[tuple[str, Form], ...]:
        """The forms of linears that do not stay dense, by module path."""
        chosen = self._chosen()
        return tuple((path, form) for group, form in chosen if not form.dense for path in group.paths)

    @property
    def left(self) -> tuple[str, ...]:
        """Module paths of the linears that stay dense."""
        return tuple(path for group, form in self._chosen() if form.dense for path in group.paths)

    def _chosen(self) -> list[tuple[Group, Form]]:
        picks = self.tries[-1].picks
        return [(group, group.forms[pick]) for group, pick in zip(self.groups, picks, strict=True)]

    def plain(self) -> dict[str, Any]:
        """As JSON-able values, for the report."""
        groups = [
            {
                "linears": list(group.paths),
                "form": str(form),
                "forms": [
                    {"form": str(form), "ms": 1e3 * option.seconds, "bytes": option.nbytes, "damage": option.damage}
                    for form, option in zip(group.forms, group.options, strict=True)
                ],
            }
            for group, form in self._chosen()
        ]
        tries = [
            {
                "mix": told_mix(self.groups, each.picks),
                "damage": each.damage,
                "ms": each.ms,
                "size": each.size,
                "measured": asdict(each.measured),
            }
            for each in self.tries
        ]
        return {
            "budget": str(self.budget),
            "speedup": self.budget.speedup,
            "size": self.budget.size,
            "workload": str(self.budget.workload) if self.budget.workload else None,
            "loss": self.budget.loss,
            "losses": list(self.losses),
            "tries": tries,
            "groups": groups,
        }


def candidates(recipe: Recipe, storage: Storage | None, *, chosen: bool) -> list[Form]:
    """The forms to choose from, dense first.

    Args:
        recipe: its pattern is the only one where it was ``chosen``.
        storage: the only one besides dense float32; None for all.
        chosen: whether the user said which pattern.
    """
    if chosen:
        return [Form(), Form(recipe.pattern, storage or FP32)]
    own = STORAGES if storage is None else (storage,)
    coded = [Form(None, Storage(its.kind, its.group, blocked=True)) for its in own if its.quantised]
    return [Form(), *coded, *(Form(pattern, its) for its in own for pattern in PATTERNS)]


def look(
    parts: Partition,
    params: Mapping[str, Tensor],
    batches: Sequence[Batch],
    output: Output,
    seed: int,
    console: Console,
) -> Witness:
    """What the damage of forms is estimated from."""
    texts = [text for batch in batches for text in batch.texts()][:TEXTS]
    return witness(parts, params, texts, output=output, seed=seed, progress=console.progress)


def make_groups(
    parts: Partition,
    params: Mapping[str, Tensor],
    seen: Witness,
    recipe: Recipe,
    forms: Sequence[Form],
    machine: Machine,
    workload: Workload | None,
    console: Console,
) -> list[Group]:
    """Every group of linears that the recipe does not skip, with the figures of all forms that may be worth it.

    Where no workload is given nothing is timed, and seconds are 0.

    Raises:
        InputError: no linear can have any form but the dense one.
    """
    grouped = _grouped(parts, recipe)
    if not any(_can_have(ops, form, {}) for ops in grouped for form in forms[1:]):
        raise InputError(f"a budget wants linears that can be {' or '.join(map(str, forms[1:4]))}, and there is none")
    if workload is None:
        seconds: dict[tuple[Any, ...], float] = {}
    else:
        seconds = _seconds(grouped, forms, machine, workload, console)
    groups = []
    for done, ops in enumerate(grouped):
        console.progress("weighing forms", done, len(grouped))
        found = [(form, _figures(ops, form, seconds)) for form in forms if _can_have(ops, form, seconds)]
        worth = [
            (form, option)
            for form, option in found
            if form.pattern is None
            or not any(_better(*other, form, option, timed=workload is not None) for other in found)
        ]
        damage = _damage(ops, [form for form, _ in worth], params, seen)
        options = [Option(option.seconds, option.nbytes, hurt) for (_, option), hurt in zip(worth, damage, strict=True)]
        groups.append(Group(ops, tuple(form for form, _ in worth), tuple(options)))
    return groups


def choose_forms(
    groups: Sequence[Group], budget: Budget, goal: Goal, trials: Trials, dense: Measured, console: Console
) -> Choice:
    """Choose the form of every group.

    Args:
        groups: with their figures.
        budget: what the user asked for.
        goal: what is to be met.
        trials: writes and measures files of choices.
        dense: the dense file.
        console: where to tell what happens.

    Raises:
        InputError: the budget cannot be met; the nearest that can be is named.
    """

    def measure(picks: Sequence[int]) -> Measured:
        return trials.measure(
            {key: group.forms[pick] for group, pick in zip(groups, picks, strict=True) for key in group.weights}
        )

    options = [group.options for group in groups]
    try:
        tries = search(options, goal, dense, measure, lambda text: console.progress(text, 0, 0))
    except OutOfReachError as error:
        names = sorted({str(form) for group in groups for form in group.forms[1:]})
        forms = names[0] if len(names) == 1 else f"the best of {len(names)} forms"
        nearest = f"{error.nearest:.2f}x" if goal.speedup else f"{error.nearest:.2f} of the bytes"
        raise InputError(
            f"a budget of {budget} is out of reach: with every linear that gains as {forms}, it is {nearest}"
        ) from error
    last = tries[-1].measured
    if not goal.judge(last)[0]:
        got = last.speedup if goal.speedup else last.size
        console.note(f"the budget of {budget} is missed: {got:.3g} was measured after {len(tries)} choices")
    return Choice(budget, tuple(groups), dense, tuple(tries))


def told_mix(groups: Sequence[Group], picks: Sequence[int]) -> str:
    """How many linears have which form: ``30 dense fp32, 180 2:4 int8``."""
    counts: dict[str, int] = {}
    for group, pick in zip(groups, picks, strict=True):
        name = str(group.forms[pick])
        counts[name] = counts.get(name, 0) + len(group.paths)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


Ops = tuple[tuple[tuple[Site, Linear], ...], ...]


def _grouped(parts: Partition, recipe: Recipe) -> list[Ops]:
    """The ops of every group; see `Group`."""
    groups: list[list[tuple[tuple[Site, Linear], ...]]] = []
    holder: dict[str, list[tuple[tuple[Site, Linear], ...]]] = {}
    for place, part in enumerate(parts.blocks):
        own = [linear for linear in part.linears if not any(named_by(glob, linear.path) for glob in recipe.skip)]
        together: dict[str, list[Linear]] = {}
        for linear in own:
            together.setdefault(linear.input, []).append(linear)
        for linears in together.values():
            op = tuple(((place, linear.node), linear) for linear in linears)
            joined = [op]
            for group in {
                id(g): g for g in (holder.get(linear.weight) for linear in linears) if g is not None
            }.values():
                joined = [*group, *joined]
                groups = [each for each in groups if each is not group]
            groups.append(joined)
            holder |= {linear.weight: joined for its in joined for _, linear in its}
    return [tuple(group) for group in groups]


def _shape(op: Sequence[tuple[Site, Linear]]) -> tuple[int, int, bool]:
    """Rows, columns and whether there is a bias, of linears that run as one."""
    linears = [linear for _, linear in op]
    rows = sum(linear.out_features for linear in linears)
    return rows, linears[0].in_features, any(linear.bias is not None for linear in linears)


def _seconds(
    grouped: Sequence[Ops], forms: Sequence[Form], machine: Machine, workload: Workload, console: Console
) -> dict[tuple[Any, ...], float]:
    """Seconds by shape and form; a form that is clearly not worth it on the size with most weights is left out."""
    shapes = sorted((_shape(op) for ops in grouped for op in ops), key=lambda shape: (shape[0] * shape[1], shape))
    counts = {shape: len(list(same)) for shape, same in groupby(shapes)}
    order = sorted(counts, key=lambda shape: -shape[0] * shape[1] * counts[shape])
    whole = sum(rows * columns * count for (rows, columns, _), count in counts.items())
    tokens = (workload.tokens or 1) * workload.batch
    found: dict[tuple[Any, ...], float] = {}
    left = list(forms)
    for done, shape in enumerate(order):
        rows, columns, bias = shape
        for at, form in enumerate(form for form in left if form.fits(columns)):
            console.progress(f"timing {form}, {rows} x {columns}", done * len(left) + at, len(order) * len(left))
            found[shape, form] = machine.seconds(form, rows, columns, tokens=tokens, weights=whole, bias=bias)
        if not done:
            left = [form for form in left if form.pattern is None or not _surely_worse(form, left, shape, found)]
    return found


def _surely_worse(
    form: Form, others: Sequence[Form], shape: tuple[int, int, bool], seconds: Mapping[tuple[Any, ...], float]
) -> bool:
    """Whether another form that cannot hurt more is clearly faster."""
    if (shape, form) not in seconds:
        return False
    return any(
        other != form
        and (shape, other) in seconds
        and other.cannot_hurt_more(form)
        and SURELY * seconds[shape, other] <= seconds[shape, form]
        for other in others
    )


def _can_have(ops: Ops, form: Form, seconds: Mapping[tuple[Any, ...], float]) -> bool:
    shapes = [_shape(op) for op in ops]
    if not all(form.fits(columns) for _, columns, _ in shapes):
        return False
    if not form.dense and sum(form.nbytes(*shape[:2]) for shape in shapes) >= sum(4 * r * c for r, c, _ in shapes):
        return False
    return not seconds or all((shape, form) in seconds for shape in shapes)


def _figures(ops: Ops, form: Form, seconds: Mapping[tuple[Any, ...], float]) -> Option:
    """Time and bytes of a group in one form; a weight that several linears share is there once."""
    weights = {linear.weight: linear for op in ops for _, linear in op}.values()
    nbytes = sum(form.nbytes(linear.out_features, linear.in_features) for linear in weights)
    return Option(sum(seconds[_shape(op), form] for op in ops) if seconds else 0.0, nbytes, 0.0)


def _better(form: Form, option: Option, other: Form, its: Option, *, timed: bool) -> bool:
    """Whether a form cannot hurt more than another and costs no more of what counts, so that nobody wants the other."""
    if form == other or not form.cannot_hurt_more(other):
        return False
    return option.seconds <= its.seconds if timed else option.nbytes <= its.nbytes


def _damage(ops: Ops, forms: Sequence[Form], params: Mapping[str, Tensor], seen: Witness) -> list[float]:
    """What each form of a group costs: all its linears, each alone."""
    sites: dict[str, list[Site]] = {}
    for op in ops:
        for site, linear in op:
            sites.setdefault(linear.weight, []).append(site)
    total = [0.0] * len(forms)
    changing = [place for place, form in enumerate(forms) if not form.dense]
    for key, places in sites.items():
        weight, norm = params[key].detach().float(), seen.norm(places)
        changed = [(forms[place].applied(weight, norm), forms[place].storage.activations) for place in changing]
        for site in places:
            for place, hurt in zip(changing, seen.damage(site, weight, changed), strict=True):
                total[place] += hurt
    return total
