"""Train the surviving weights of the whole model until it predicts again what the dense model predicts."""

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Final, Literal

import torch
from torch import Tensor

from ..calibrate.sums import total
from .checkpoint import Checkpoint, from_grids, to_grids
from .errors import InputError
from .frontend.batches import Batch
from .fx.partition import Partition
from .fx.run import Rounding, Values, run_model, run_part, run_part_rounded, run_part_with_grad
from .quantise import STRENGTH_RATE, Gridded
from .recipe import Distil, DistilReport, Progress
from .trained import Trained
from .tune import BETAS, hold_out, shuffling, warm_up_and_cosine

Output = Literal["logits", "values"]
"""What the model returns first: logits of the next token, or values such as hidden states."""
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
    progress: Progress = lambda stage, done, total: None,
    checkpoint: Checkpoint | None = None,
    name: str = "distil",
) -> DistilReport:
    r"""Train the non-zeros of the pruned weights, all blocks together, against the dense model's output.

    Of logits z, with a softmax over the vocabulary (Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a
    Neural Network", temperature 1), and of other values y:

    .. math:: \frac{1}{n} \sum_t \mathrm{KL}\bigl(\sigma(z_t) \,\Vert\, \sigma(z_t^W)\bigr), \ \sigma = \text{softmax}
              \qquad \sum_t \lVert y_t^W - y_t \rVert_2^2 \Big/ \sum_t \lVert y_t \rVert_2^2

    Block by block a model is taught to repeat every hidden state; here only what it says counts, so an error that the
    next blocks can make good costs nothing. AdamW as in ``tune``; the learning rate of a weight is a fraction of its
    root mean square, since Adam moves every number by about the learning rate, and on a grid half of that. One batch of
    eight is held out and decides which epoch's weights are kept, those from before included. Weights on a grid stay
    there: see `Trained`.

    Before:  W with zeros
    After:   W with the same zeros
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
        progress: told about every step.
        checkpoint: every epoch that is done is kept there, and gone on from.
        name: of the step in the checkpoint.

    Raises:
        InputError: the loss is not finite.
    """
    trained = Trained(params, list(dict.fromkeys(keys)), quantised)
    train, held_out = hold_out(batches)
    model = _Model(partition, output, {key: its.storage.activations for key, its in (quantised or {}).items()})
    groups = []
    for key, weight in trained.weights.items():
        rate = settings.rate * (ON_GRID_RATE if key in trained.strengths else 1)
        groups.append({"params": [weight], "peak": rate * _size(weight, trained.keep[key])})
    groups += [{"params": [strength], "peak": STRENGTH_RATE} for strength in trained.strengths.values()]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=0.0)
    done = checkpoint.load(name) if checkpoint else None
    if done is None:
        before = best = model.mean_loss(held_out, dense, params)
        epoch = 0
    else:
        tensors, notes = done
        before, best, epoch = (notes[n] for n in ("before", "best", "epoch"))
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
            best = found
            trained.store(params, quantised)
        if checkpoint is not None:
            tensors, grids = from_grids({key: its for key, its in (quantised or {}).items() if key in trained.weights})
            kept = {f"params/{key}": params[key] for key in trained.weights}
            notes = {"before": before, "best": best, "epoch": epoch, "grids": grids}
            checkpoint.save(name, {**trained.state(optimizer), **kept, **tensors}, notes)
    return DistilReport(before, best, epoch)


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
    tokens, size, gathered = 0, 0.0, 0
    for done, index in enumerate(order, 1):
        target = model.target(batches[index], dense)
        rows = model.run(batches[index], trained.live(learn=True), learn=True)
        torch.autograd.backward(model.errors(rows, target).sum())
        tokens, size, gathered = tokens + len(target), size + model.size(target), gathered + 1
        if tokens >= settings.tokens_per_step or done == len(batches):
            factor = warm_up_and_cosine((epoch + (done - gathered / 2) / len(batches)) / settings.epochs)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak"]
            trained.step(optimizer, size=size or 1.0)
            tokens, size, gathered = 0, 0.0, 0
        progress("distilling", epoch * len(batches) + done, settings.epochs * len(batches))


class _Model:
    """The partitioned graph as one function, and how far two of its outputs are apart."""

    def __init__(self, partition: Partition, output: Output, rounded: Mapping[str, Rounding]) -> None:
        self._partition = partition
        self._output = output
        self._rounded = rounded

    def run(self, batch: Batch, params: Mapping[str, Tensor], *, learn: bool = False) -> Tensor:
        """The first output of the sparse model, ``[tokens that count, features]``."""
        run = run_part_with_grad if learn else run_part_rounded
        return self._rows(batch, params, partial(run, rounded=self._rounded))

    def target(self, batch: Batch, dense: Mapping[str, Tensor]) -> Tensor:
        """What the dense model says: log-probabilities, or values."""
        rows = self._rows(batch, dense, run_part)
        return rows.log_softmax(-1) if self._output == "logits" else rows

    def errors(self, rows: Tensor, target: Tensor) -> Tensor:
        """What adds up to the loss of a batch, of the shape of ``rows``."""
        if self._output == "values":
            return (rows - target).square()
        return target.exp() * (target - rows.log_softmax(-1))

    def size(self, target: Tensor) -> float:
        """What the loss of a batch is divided by: tokens, or the target's energy."""
        return float(len(target)) if self._output == "logits" else total(target.square())

    def mean_loss(self, batches: Sequence[Batch], dense: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> float:
        """The loss over some batches; rounded, so that it is the same for any number of threads."""
        wrong = size = 0.0
        for batch in batches:
            target = self.target(batch, dense)
            wrong += total(self.errors(self.run(batch, params), target))
            size += self.size(target)
        return float(torch.tensor(wrong / size if size else wrong, dtype=torch.float32))

    def _rows(self, batch: Batch, params: Mapping[str, Tensor], run: Callable[..., Values]) -> Tensor:
        rows = run_model(self._partition, batch.inputs, params, run).float().flatten(end_dim=-2)
        return rows if batch.token_mask is None else rows[batch.token_mask.reshape(-1)]


def _size(weight: Tensor, keep: Tensor) -> float:
    """Root mean square of the non-zeros."""
    return math.sqrt(total(weight.detach().square()) / max(1, int(keep.sum())))
