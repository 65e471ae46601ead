"""Train the surviving weights of a block, half by half, until it does again what the dense block did."""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..calibrate.sums import total
from .block import Block
from .errors import InputError
from .frontend.batches import Batch
from .fx.halves import split_halves
from .fx.partition import Part
from .fx.run import Rounding, Values, advance, run_part, run_part_rounded, run_part_with_grad
from .quantise import STRENGTH_RATE, Gridded
from .recipe import Progress, Tune, TuneReport
from .trained import Trained

T = TypeVar("T")

HOLD_OUT = 8
"""One batch of so many is not trained on; it decides which epoch's weights are kept."""
WARM_UP = 0.1
"""Fraction of the steps in which the learning rate rises to its peak."""
BETAS = (0.9, 0.95)
SHAKE = 1e-2
"""How far weights are moved, relative to their size, to find out how much the output depends on them."""
ON_GRID_RATE = 0.3
"""Learning rate of weights on a grid over that of floats."""
PATIENCE = 2
"""Epochs without a gain on the held-out batches after which a half is done."""


@dataclass(frozen=True)
class Sample:
    """One batch as a half sees it.

    Attributes:
        inputs: what the half reads, on the pruned path.
        targets: what the dense block hands on there, by name.
        token_mask: bool ``[batch, sequence]``, False for padding; None where every position counts.
    """

    inputs: Values
    targets: dict[str, Tensor]
    token_mask: Tensor | None


def tune(
    block: Block,
    dense: Mapping[str, Tensor],
    params: MutableMapping[str, Tensor],
    states: Sequence[Values],
    outputs: Sequence[Values],
    batches: Sequence[Batch],
    quantised: MutableMapping[str, Gridded] | None = None,
) -> tuple[TuneReport, ...]:
    """Fine-tune the pruned linears of a block: its halves in order, or all of it at once.

    Each half is trained on what the halves before it, already tuned, hand on; its target is what the dense block has
    there on the same inputs to the block. So the second half also makes up for what the first one could not.

    Args:
        block: the block; nothing is done where its recipe has no ``tune``.
        dense: weights by key before pruning.
        params: weights by key, pruned; those of the pruned linears are replaced. Zeros stay zeros.
        states: live values of every batch before the block; not changed.
        outputs: the dense block's outputs by batch.
        batches: the batches they come from.
        quantised: the weights that are on a grid, by key, to train so that they stay there; replaced as well. It
            takes half of the epochs, with smaller steps: the weights were tuned as floats before.

    Raises:
        InputError: a loss is not finite.
    """
    settings = block.recipe.tune
    if settings is None:
        return ()
    if quantised is not None:
        settings = replace(settings, epochs=max(1, settings.epochs // 2), rate=ON_GRID_RATE * settings.rate)
    pruned = {linear.weight for linear in block.pruned}
    halves = split_halves(block.part, block.names) if settings.scope == "halves" else (block.part,)
    inner, exact = [dict(values) for values in states], [dict(values) for values in states]
    reports = []
    for index, half in enumerate(halves):
        kept = {name for later in halves[index + 1 :] for name in later.inputs}
        handed = [name for name in half.outputs if name in block.judged or name not in block.part.outputs]
        targets = []
        for values, known in zip(exact, outputs, strict=True):
            made = known if half is halves[-1] else advance(half, values, dense, block.names, kept)
            targets.append({name: made[name] for name in handed if name and _is_float(made[name])})
        reads = [{name: values[name] for name in half.inputs if name in values} for values in inner]
        samples = [
            Sample(mine, wanted, batch.token_mask) for mine, wanted, batch in zip(reads, targets, batches, strict=True)
        ]
        keys = [linear.weight for linear in half.linears if linear.weight in pruned]
        if keys:
            reports.append(tune_part(half, samples, params, block.names, keys, settings, block.progress, quantised))
        if half is not halves[-1]:
            for values in inner:
                advance(half, values, params, block.names, kept)
    return tuple(reports)


def tune_part(
    part: Part,
    samples: Sequence[Sample],
    params: MutableMapping[str, Tensor],
    names: Mapping[str, str],
    keys: Sequence[str],
    settings: Tune,
    progress: Progress = lambda stage, done, total: None,
    quantised: MutableMapping[str, Gridded] | None = None,
) -> TuneReport:
    r"""Train the non-zeros of some weights of one part by AdamW (Loshchilov and Hutter 2019) without weight decay.

    .. math:: \min_{W} \sum_t \lVert f_W(x_t) - y_t \rVert_2^2 \Big/ \sum_t \lVert y_t \rVert_2^2
              \quad \text{where } W_{ij} = 0 \text{ stays}

    Guo et al. 2024, "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs". The learning rate of each weight
    comes from `learning_rates`; it rises over the first tenth of the steps and falls as a cosine. After every epoch
    the loss on the held-out batches, rounded to float32, decides: the best epoch's weights are kept, those from
    before included. Biases and norms stay.

    A weight that is on a grid stays there: see `Trained`.

    Args:
        part: a half or a block.
        samples: one a batch; with fewer than two, the one is trained on and decides as well.
        params: weights by key; ``keys`` are replaced, unless no epoch was better.
        names: outer placeholder name to parameter key.
        keys: what to train.
        settings: epochs, learning rate, tokens in a step.
        progress: told about every epoch.
        quantised: the weights that are on a grid, by key; replaced where ``params`` are. Their linears run on
            activations rounded as the kernels round them.

    Raises:
        InputError: the loss is not finite.
    """
    trained = Trained(params, keys, quantised)
    weights, strengths = trained.weights, trained.strengths
    train, held_out = hold_out(samples)
    energy = sum(_energy(sample) for sample in train) or 1.0
    tokens = sum(_tokens(sample) for sample in train)
    peaks = learning_rates(part, held_out[0], {**params, **weights}, names, keys, rate=settings.rate)
    peaks += [STRENGTH_RATE] * len(strengths)
    learned = [*weights.values(), *strengths.values()]
    groups = [{"params": [w], "lr": lr} for w, lr in zip(learned, peaks, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    rounded = {key: its.storage.activations for key, its in (quantised or {}).items()}
    before = best = _loss(part, held_out, params, names, rounded)
    epoch = waited = 0
    while epoch < settings.epochs and waited < PATIENCE:
        seen = 0
        for step in _steps(train, settings.tokens_per_step, shuffling(settings.seed, epoch)):
            for sample in step:
                live = trained.live(learn=True)
                errors = _errors(sample, run_part_with_grad(part, sample.inputs, live, names, rounded))
                torch.autograd.backward(torch.stack([error.square().sum() for error in errors]).sum() / energy)
            count = sum(_tokens(sample) for sample in step)
            factor = warm_up_and_cosine((epoch + (seen + count / 2) / tokens) / settings.epochs)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = factor * peak
            trained.step(optimizer)
            seen += count
        epoch += 1
        waited += 1
        loss = _loss(part, held_out, trained.live(learn=False), names, rounded)
        progress(f"tuning {part.path}", epoch, settings.epochs)
        if not math.isfinite(loss):
            raise InputError(
                f"{part.path}: the loss of fine-tuning is {loss} after epoch {epoch}; try a lower --tune-lr"
            )
        if loss < best:
            best, waited = loss, 0
            trained.store(params, quantised)
    return TuneReport(tuple(linear.path for linear in part.linears if linear.weight in keys), before, best, epoch)


def learning_rates(
    part: Part,
    sample: Sample,
    params: Mapping[str, Tensor],
    names: Mapping[str, str],
    keys: Sequence[str],
    *,
    rate: float,
) -> list[float]:
    """The learning rate of each weight, found by shaking its non-zeros and looking how far the output moves.

    A step that moves every non-zero by it moves the output by about ``rate`` times the error there is to mend. So one
    ``rate`` serves query weights of size 1 whose half is almost right, and gate weights of size 0.2 whose half is not.

    Args:
        part: a half or a block.
        sample: one batch of it.
        params: weights by key.
        names: outer placeholder name to parameter key.
        keys: the weights.
        rate: the fraction.

    Returns:
        One learning rate a key; 0 for a weight that the output does not depend on.
    """
    made = run_part(part, sample.inputs, params, names)
    error = _length(_errors(sample, made))
    rates = []
    for key in keys:
        keep = params[key] != 0
        count = max(1, int(keep.sum()))
        noise = torch.randn(keep.shape, generator=torch.Generator().manual_seed(0)) * keep
        noise *= SHAKE * math.sqrt(total(params[key].square()) / count)
        shaken = run_part(part, sample.inputs, {**params, key: params[key] + noise}, names)
        moved = _length([_counted(sample, shaken[name] - made[name]) for name in sample.targets])
        rates.append(rate * error / moved * math.sqrt(total(noise.square()) / count) if moved else 0.0)
    return rates


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def hold_out(samples: Sequence[T]) -> tuple[list[T], list[T]]:
    """What is trained on, and what decides."""
    every = min(HOLD_OUT, len(samples))
    if every < 2:
        return list(samples), list(samples)
    held_out = list(samples[every - 1 :: every])
    return [sample for index, sample in enumerate(samples) if index % every != every - 1], held_out


def shuffling(seed: int, epoch: int) -> torch.Generator:
    """Of the order of the batches in one epoch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))


def _steps(samples: Sequence[Sample], tokens: int, generator: torch.Generator) -> list[list[Sample]]:
    """The samples in random order, gathered until a step has so many tokens."""
    order = torch.randperm(len(samples), generator=generator).tolist()
    steps: list[list[Sample]] = []
    count = tokens
    for index in order:
        if count >= tokens:
            steps.append([])
            count = 0
        steps[-1].append(samples[index])
        count += _tokens(samples[index])
    return steps


def warm_up_and_cosine(done: float) -> float:
    """The learning rate over its peak after a fraction of all steps."""
    return min(1.0, done / WARM_UP) * (1 + math.cos(math.pi * done)) / 2


def _length(differences: Sequence[Tensor]) -> float:
    return math.sqrt(math.fsum(total(difference.square()) for difference in differences))


def _tokens(sample: Sample) -> int:
    if sample.token_mask is not None:
        return int(sample.token_mask.sum())
    return max(math.prod(target.shape[:-1]) for target in sample.targets.values())


def _counted(sample: Sample, value: Tensor) -> Tensor:
    """``[tokens, features]`` of a value without padding."""
    rows = value.reshape(-1, value.shape[-1])
    return rows if sample.token_mask is None else rows[sample.token_mask.reshape(-1)]


def _errors(sample: Sample, made: Values) -> list[Tensor]:
    return [_counted(sample, made[name] - target) for name, target in sample.targets.items()]


def _energy(sample: Sample) -> float:
    return math.fsum(total(_counted(sample, target).square()) for target in sample.targets.values())


def _loss(
    part: Part,
    samples: Sequence[Sample],
    params: Mapping[str, Tensor],
    names: Mapping[str, str],
    rounded: Mapping[str, Rounding],
) -> float:
    """Squared error over the target's energy; as a float32, so that it is the same for any number of threads."""
    wrong, size = 0.0, 0.0
    for sample in samples:
        made = run_part_rounded(part, sample.inputs, params, names, rounded)
        wrong += math.fsum(total(error.square()) for error in _errors(sample, made))
        size += _energy(sample)
    return float(torch.tensor(wrong / size if size else wrong, dtype=torch.float32))
