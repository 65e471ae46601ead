"""Train the surviving weights of the whole model until it predicts again what the dense model predicts."""

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from ..calibrate.patterns import Pattern
from ..calibrate.sums import total
from .checkpoint import Checkpoint, from_grids, to_grids
from .errors import InputError
from .frontend.batches import Batch
from .fx.partition import Partition
from .fx.run import Rounding, Values, run_model, run_part, run_part_rounded, run_part_with_grad
from .outputs import Output, errors, rows_of, size_of, target_of
from .quantise import STRENGTH_RATE, Gridded
from .recipe import Distil, DistilReport, Progress
from .trained import Trained
from .tune import BETAS, hold_out, shuffling, warm_up_and_cosine

FROZEN: Final = 1 / 3
"""Fraction of the steps, at the end, in which masks do not move: what is left then learns to do without the rest."""
MANY: Final = 1 << 30
RATE: Final = 0.0015
"""Learning rate where none is given, of logits of the next token."""
ENCODER_RATE: Final = 0.0007
"""And of everything else: a step sees fewer texts than tokens, and its gradient is less sure."""
ON_GRID_RATE: Final = 0.5
"""Learning rate of a weight on a grid, over that of a float: there it moves the model by whole steps or not at all."""


def distil(
    partition: Partition,
    dense: Mapping[str, Tensor],
    params: MutableMapping[str, Tensor],
    keys: Sequence[str],
    batches: Sequence[Batch],
    settings: Distil,
    *,
    output: Output,
    quantised: MutableMapping[str, Gridded] | None = None,
    patterns: Mapping[str, Pattern] | None = None,
    progress: Progress = lambda stage, done, total: None,
    checkpoint: Checkpoint | None = None,
    name: str = "distil",
) -> DistilReport:
    """Train the non-zeros of the pruned weights, all blocks together, against the dense model's output.

    The loss is that of `outputs.errors`. Block by block a model is taught to repeat every hidden state; here only what
    it says counts, so an error that the next blocks can make good costs nothing. AdamW as in ``tune``; the learning
    rate of a weight is a fraction of its root mean square, since Adam moves every number by about the learning rate,
    and on a grid half of that. One batch of eight is held out and decides which epoch's weights are kept, those from
    before included. Weights on a grid stay there: see `Trained`.

    With ``settings.moves`` zeros move for the first two thirds of the steps: see `shadow`.

    Before:  W with zeros
    After:   W with the same zeros, or with others of the same pattern: as many in every group, or in every row
    Left alone: everything but ``keys``: biases, norms, embeddings, the head, linears that were not pruned.
    Numerics: activations of the whole model are in memory for one batch, and a dense copy of its weights.

    Args:
        partition: the model.
        dense: weights by key before pruning; folded or not, for a fold changes nothing that comes out.
        params: weights by key, pruned; ``keys`` are replaced, unless no epoch was better.
        keys: the weights to train.
        batches: the calibration batches.
        settings: epochs, learning rate and tokens of a step.
        output: what the model's first output is.
        quantised: the weights that are on a grid, by key; replaced where ``params`` are. Their linears run on
            activations rounded as the kernels round them.
        patterns: what each weight was pruned to, by key; read where zeros may move.
        progress: told about every step.
        checkpoint: every epoch that is done is kept there, and gone on from.
        name: of the step in the checkpoint.

    Raises:
        InputError: the loss is not finite.
    """
    trained = Trained(params, list(dict.fromkeys(keys)), quantised, settings.moves, patterns)
    train, held_out = hold_out(batches)
    model = _Model(partition, output, {key: its.storage.activations for key, its in (quantised or {}).items()})
    usual = RATE if output == "logits" else ENCODER_RATE
    groups = []
    for key, weight in trained.weights.items():
        rate = (settings.rate or usual) * (ON_GRID_RATE if key in trained.strengths else 1)
        groups.append({"params": [weight], "peak": rate * _size(weight, trained.keep[key])})
    groups += [{"params": [strength], "peak": STRENGTH_RATE} for strength in trained.strengths.values()]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=0.0)
    done = checkpoint.load(name) if checkpoint else None
    if done is None:
        before = best = model.mean_loss(held_out, dense, params)
        epoch, moved = 0, trained.moved()
    else:
        tensors, notes = done
        before, best, epoch, moved = (notes[n] for n in ("before", "best", "epoch", "moved"))
        trained.restore(tensors, optimizer)
        params.update({key: tensors[f"params/{key}"] for key in trained.weights})
        if quantised is not None:
            quantised.update(to_grids(tensors, notes["grids"]))
    while epoch < settings.epochs:  # all of them: what a high learning rate has lost, its fall brings back
        _train(model, trained, optimizer, train, dense, settings, epoch, progress)
        epoch += 1
        found = model.mean_loss(held_out, dense, trained.live(learn=False))
        if not math.isfinite(found):
            raise InputError(f"the loss of distillation is {found} after epoch {epoch}; try a lower --distil-lr")
        if found < best:
            best, moved = found, trained.moved()
            trained.store(params, quantised)
        if checkpoint is not None:
            tensors, grids = from_grids({key: its for key, its in (quantised or {}).items() if key in trained.weights})
            kept = {f"params/{key}": params[key] for key in trained.weights}
            notes = {"before": before, "best": best, "epoch": epoch, "moved": moved, "grids": grids}
            checkpoint.save(name, {**trained.state(optimizer), **kept, **tensors}, notes)
    return DistilReport(before, best, epoch, moved)


def _train(
    model: "_Model",
    trained: Trained,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    dense: Mapping[str, Tensor],
    settings: Distil,
    epoch: int,
    progress: Progress,
) -> None:
    """One epoch: every batch once, in random order; the loss of a step is that of all its tokens."""
    order = torch.randperm(len(batches), generator=shuffling(settings.seed, epoch)).tolist()
    steps = _gathered([_tokens(batches[index]) for index in order], settings.tokens_per_step)
    done = 0
    for step, count in enumerate(steps):
        if settings.moves is not None and not trained.frozen:
            now = epoch * len(steps) + step
            if now >= (1 - FROZEN) * settings.epochs * len(steps):
                trained.freeze()
            elif now and now % settings.moves.every == 0:
                trained.choose(optimizer)
        size = 0.0
        for index in order[done : done + count]:
            target = model.target(batches[index], dense)
            rows = model.run(batches[index], trained.live(learn=True), learn=True)
            torch.autograd.backward(model.errors(rows, target, batches[index]).sum())
            size += model.size(target)
            done += 1
            progress("distilling", epoch * len(batches) + done, settings.epochs * len(batches))
        factor = warm_up_and_cosine((epoch + (done - count / 2) / len(batches)) / settings.epochs)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        trained.step(optimizer, size=size or 1.0, factor=factor)


def _gathered(sizes: Sequence[int], least: int) -> list[int]:
    """How many batches make each step, so that it has seen ``least`` tokens; the last one may have fewer."""
    steps, seen = [], least
    for size in sizes:
        if seen >= least:
            steps.append(0)
            seen = 0
        steps[-1] += 1
        seen += size
    return steps


def _tokens(batch: Batch) -> int:
    """Tokens of a batch that count; pictures are enough for a step, however many a batch has."""
    if batch.token_mask is not None:
        return int(batch.token_mask.sum())
    shape = batch.inputs[0].shape
    return math.prod(shape[:2]) if len(shape) < 4 else MANY


class _Model:
    """The partitioned graph as one function, and how far two of its outputs are apart."""

    def __init__(self, partition: Partition, output: Output, rounded: Mapping[str, Rounding]) -> None:
        self._partition = partition
        self._output = output
        self._rounded = rounded

    def run(self, batch: Batch, params: Mapping[str, Tensor], *, learn: bool = False) -> Tensor:
        """What counts of the sparse model's output, ``[rows, features]``."""
        run = run_part_with_grad if learn else run_part_rounded
        return self._rows(batch, params, partial(run, rounded=self._rounded))

    def target(self, batch: Batch, dense: Mapping[str, Tensor]) -> Tensor:
        """What the dense model says: made again every time, for of all batches it would be too large."""
        return target_of(self._output, self._rows(batch, dense, run_part))

    def errors(self, rows: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """What adds up to the loss of a batch."""
        return errors(self._output, rows, target, batch)

    def size(self, target: Tensor) -> float:
        """What the loss of a batch is divided by."""
        return size_of(self._output, target)

    def mean_loss(self, batches: Sequence[Batch], dense: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> float:
        """The loss over some batches; rounded, so that it is the same for any number of threads."""
        wrong = size = 0.0
        for batch in batches:
            target = self.target(batch, dense)
            wrong += total(self.errors(self.run(batch, params), target, batch))
            size += self.size(target)
        return float(torch.tensor(wrong / size if size else wrong, dtype=torch.float32))

    def _rows(self, batch: Batch, params: Mapping[str, Tensor], run: Callable[..., Values]) -> Tensor:
        return rows_of(self._output, run_model(self._partition, batch.inputs, params, run), batch)


def _size(weight: Tensor, keep: Tensor) -> float:
    """Root mean square of the non-zeros."""
    return math.sqrt(total(weight.detach().square()) / max(1, int(keep.sum())))
