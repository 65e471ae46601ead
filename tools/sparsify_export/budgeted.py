"""From a budget to a pruned model: look, choose, prune, and for a loss measure and choose again."""

import math
import secrets
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from .budget import Choice, Group, candidates, choose_forms, look, make_groups
from .calibrate.search import Measured, tightened
from .evaluation import perplexity_of
from .passes.errors import InputError
from .passes.frontend.batches import Batch, token_batches
from .passes.frontend.load import Pretrained
from .passes.frontend.trace import Traced
from .passes.fx.partition import Partition
from .passes.fx.run import Rounding, run_model, run_part_rounded
from .passes.outputs import Output
from .passes.recipe import Recipe
from .passes.sparsify import Sparsified
from .publish import PARTIAL
from .runtime.evaluate import Perplexity
from .runtime.machine import this_machine
from .runtime.trial import Trials
from .settings import Budget, Console, Settings
from .stages import Stages
from .target import Target

CORRECTED = 2
"""How often a loss that was measured to be too large makes the choice anew."""


@dataclass(frozen=True)
class Subject:
    """The model that a budget is for.

    Attributes:
        pretrained: as it was loaded.
        traced: its graph.
        parts: the same in parts.
        params: its weights by key.
        batches: calibration batches.
        output: what its first output is.
        retrace: traces it anew, for trial files.
    """

    pretrained: Pretrained
    traced: Traced
    parts: Partition
    params: MutableMapping[str, Tensor]
    batches: Sequence[Batch]
    output: Output
    retrace: Callable[[], Traced]


@dataclass(frozen=True)
class Weighed:
    """A model and its dense file, with the figures of all forms.

    Attributes:
        groups: of linears.
        dense: the dense file.
        trials: writes and measures files of choices.
    """

    groups: list[Group]
    dense: Measured
    trials: Trials


def weigh(model: Subject, settings: Settings, folder: Path, console: Console) -> Weighed:
    """Look at the model, time the forms of its linears, and write and time the dense file.

    Args:
        model: the model.
        settings: with a recipe and a budget.
        folder: for trial files.
        console: where to tell what happens.

    Raises:
        InputError: the model cannot run the workload, or no linear has a choice.
    """
    recipe, budget = settings.recipe, settings.budget
    assert recipe is not None
    assert budget is not None
    trials = Trials(model.retrace, folder, budget.workload)
    console.progress("writing the dense model", 0, 0)
    dense = trials.dense()
    seen = look(model.parts, model.params, model.batches, model.output, settings.calibration.seed, console)
    forms = candidates(recipe, budget.storage, chosen=budget.pattern)
    machine = this_machine()
    groups = make_groups(model.parts, model.params, seen, recipe, forms, machine, budget.workload, console)
    return Weighed(groups, dense, trials)


def choose_and_prune(
    model: Subject,
    settings: Settings,
    before: Perplexity | None,
    target: Target,
    prune: Callable[[Recipe], Sparsified],
    stages: Stages,
    console: Console,
) -> tuple[Choice, Sparsified]:
    """Choose the form of every linear, and prune to it.

    Args:
        model: the model; its weights are pruned.
        settings: with a recipe and a budget.
        before: the dense model's perplexity, where a loss is to be held.
        target: beside which trial files are written, and removed again.
        prune: prunes the model to a recipe.
        stages: take the times.
        console: where to tell what happens.

    Raises:
        InputError: nothing meets the budget, or see `weigh`.
    """
    recipe, budget = settings.recipe, settings.budget
    assert recipe is not None
    assert budget is not None
    goal, whole = budget.goal, dict(model.params)
    with trial_folder(target) as folder:
        with stages.run("choose"):
            weighed = weigh(model, settings, folder, console)
        for corrected in range(CORRECTED + 1):
            with stages.run("choose"):
                choice = choose_forms(weighed.groups, budget, goal, weighed.trials, weighed.dense, console)
            done = prune(chosen_recipe(recipe, budget, choice))
            if budget.loss is None or before is None:
                return choice, done
            with stages.run("evaluate the choice"):
                loss = _perplexity(model, settings, done, console) / before.perplexity - 1
            choice = replace(choice, losses=(*choice.losses, loss))
            if loss <= budget.loss or corrected == CORRECTED:
                break
            goal = tightened(goal, choice.tries[-1].damage, math.log1p(loss))
            console.note(f"the perplexity grew by {100 * loss:.2f} %, so the budget of damage is now {goal.damage:.4g}")
            model.params.clear()
            model.params.update(whole)
    if loss > (budget.loss or 0):
        console.note(f"the budget of {budget} is missed: the perplexity grew by {100 * loss:.2f} %")
    return choice, done


def chosen_recipe(recipe: Recipe, budget: Budget, choice: Choice) -> Recipe:
    """The recipe for what was chosen: a pattern that the user named is the recipe's own."""
    return replace(recipe, budgeted=choice.left, forms=() if budget.pattern else choice.forms)


@contextmanager
def trial_folder(target: Target) -> Iterator[Path]:
    """A folder for trial files beside the target, gone with all that is in it afterwards."""
    stage = target.out.with_name(f".{target.out.name}.{secrets.token_hex(4)}{PARTIAL}")
    files = Target(target.out, target.folder, target.overwrite, stage)
    with files.guarded():
        files.open()
        yield stage


def _perplexity(model: Subject, settings: Settings, done: Sparsified, console: Console) -> float:
    """Of the pruned graph in torch, its activations rounded as the file will round them."""
    storages = {key: form.storage for key, form in done.forms.items()}
    storages |= {key: settings.storage for key in done.patterns if key not in storages}
    rounded: dict[str, Rounding] = {key: its.activations for key, its in storages.items()}
    run = partial(run_part_rounded, rounded=rounded)

    def logits(ids: Tensor) -> Tensor:
        (batch,) = token_batches(model.traced, ids, names=model.pretrained.inputs)
        return run_model(model.parts, batch.inputs, model.params, run)

    if model.pretrained.kind != "causal":
        raise InputError(f"{model.pretrained.source} is no language model, so --max-loss has no meaning")
    return perplexity_of(logits, model.pretrained, settings, console).perplexity
