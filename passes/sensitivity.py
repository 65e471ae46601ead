"""How much the model's loss grows when a linear loses weights, estimated for all linears from one backward pass."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..calibrate.masks import keep_mask
from ..calibrate.matmul import linear as product
from ..calibrate.patterns import NM, Pattern
from ..calibrate.scores import wanda
from ..calibrate.statistics import ActNorm
from .errors import InputError
from .frontend.batches import Batch
from .fx.linears import Linear
from .fx.partition import Part, Partition
from .fx.run import Fast, Values, run_model
from .outputs import Output
from .recipe import Progress


def sensitivity(
    partition: Partition,
    params: Mapping[str, Tensor],
    batches: Sequence[Batch],
    pattern: Pattern,
    *,
    output: Output,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, float]:
    r"""The damage of pruning each linear alone, without an update of what survives.

    With x what the linear reads at a token t, W' its weight with the zeros of Wanda's mask, and g the gradient of the
    loss by its output there,

    .. math:: d = \frac{1}{2n} \sum_t \bigl( g_t^\top (W' - W) x_t \bigr)^2

    For logits the loss is the surprise at tokens drawn from what the model itself predicts; then d is the second-order
    term of KL(model, pruned model) in nats a token (Amari 1998, "Natural Gradient Works Efficiently in Learning";
    the terms between two tokens are left out, whose mean is small and whose noise is not). For values y the loss is
    v'y with random v, and d is the squared error of y over the squared norm of y.

    Args:
        partition: the model.
        params: dense weights by key.
        batches: what to look at; each goes forward and backward through the whole model, one text at a time.
        pattern: the zeros to make.
        output: what the model's first output is.
        seed: of the tokens drawn, or of v.
        progress: told about every text.

    Returns:
        d by module path, for the linears of the blocks whose in_features the pattern fits.

    Raises:
        InputError: no token counts, or the loss has no gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = [text for batch in batches for text in _texts(batch)]
    linears = [linear for part in partition.blocks for linear in part.linears if _fits(pattern, linear)]
    if not linears:
        return {}
    norms = {linear.path: ActNorm(linear.in_features) for linear in linears}
    for done, text in enumerate(texts):
        progress("looking at activations", done, len(texts))
        with torch.no_grad():
            _run(partition, params, text, _norms(norms, text))
    removed = {}
    for linear in linears:
        weight = params[linear.weight].detach().float()
        keep = keep_mask(wanda(weight, norms[linear.path].norm()), pattern, "row")
        removed[linear.path] = torch.where(keep, 0.0, -weight)
    damage, size = dict.fromkeys(removed, 0.0), 0.0
    for done, text in enumerate(texts):
        progress("estimating damage", done, len(texts))
        found, counted = _damage_of(partition, params, text, removed, output, generator)
        damage = {path: damage[path] + found[path] for path in damage}
        size += counted
    if not size:
        raise InputError("no token of the calibration batches counts, so no damage can be estimated")
    return {path: total / size for path, total in damage.items()}


def _fits(pattern: Pattern, linear: Linear) -> bool:
    return not isinstance(pattern, NM) or linear.in_features % pattern.m == 0


def _texts(batch: Batch) -> list[Batch]:
    """The rows of a batch, each a batch: one backward pass wants the activations of the whole model."""
    rows = len(batch.inputs[0])
    whole = batch.token_mask
    masks = [None if whole is None else whole[row : row + 1] for row in range(rows)]
    return [Batch(tuple(x[row : row + 1] for x in batch.inputs), mask, batch.cached) for row, mask in enumerate(masks)]


def _damage_of(
    partition: Partition,
    params: Mapping[str, Tensor],
    text: Batch,
    removed: Mapping[str, Tensor],
    output: Output,
    generator: torch.Generator,
) -> tuple[dict[str, float], float]:
    """The damage of one text by path, summed, and what it is to be divided by: tokens, or the output's energy."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def nudge(linear: Linear, x: Tensor, y: Tensor) -> Tensor:
        probe = torch.zeros_like(y, requires_grad=True)
        seen[linear.path] = (x.detach(), probe)
        return y + probe

    with torch.enable_grad():
        rows = _counted(_run(partition, params, text, nudge), text)
        if output == "logits":
            drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator)
            loss = -rows.log_softmax(-1).gather(-1, drawn).sum()
            size, factor = float(len(rows)), 0.5
        else:
            loss = (rows * torch.randn(rows.shape, generator=generator)).sum()
            size, factor = float(rows.detach().square().sum()), 1.0
    paths = [path for path in removed if path in seen]
    gradients = torch.autograd.grad(loss, [seen[path][1] for path in paths], allow_unused=True)
    found = dict.fromkeys(removed, 0.0)
    for path, gradient in zip(paths, gradients, strict=True):
        if gradient is None:
            raise InputError(f"{path} does not reach the model's first output, so its damage cannot be estimated")
        change = product(seen[path][0].float(), removed[path])
        found[path] = factor * float((gradient * change).sum(-1).double().square().sum())
    return found, size


def _counted(output: Tensor, text: Batch) -> Tensor:
    """The rows of the model's first output that count, ``[tokens, features]``."""
    rows = output.float().flatten(end_dim=-2)
    mask = None if text.token_mask is None else text.token_mask.reshape(-1)
    return rows if mask is None or len(mask) != len(rows) else rows[mask]


def _norms(norms: Mapping[str, ActNorm], text: Batch) -> Callable[[Linear, Tensor, Tensor], Tensor]:
    def see(linear: Linear, x: Tensor, y: Tensor) -> Tensor:
        if linear.path in norms:
            mask = text.token_mask if text.token_mask is not None and text.token_mask.shape == x.shape[:-1] else None
            norms[linear.path].update(x, mask)
        return y

    return see


def _run(
    partition: Partition, params: Mapping[str, Tensor], text: Batch, see: Callable[[Linear, Tensor, Tensor], Tensor]
) -> Tensor:
    """The model's first output, where ``see(linear, x, y)`` gives what each linear of a block returns."""

    def run(part: Part, values: Values, params: Mapping[str, Tensor], names: Mapping[str, str]) -> Values:
        given = [params[names[name]] if name in names else values[name] for name in part.inputs]
        made = _Seen(part, see).run(*given)
        results = made if isinstance(made, tuple | list) else (made,)
        return {name: value for name, value in zip(part.outputs, results, strict=True) if name}

    return run_model(partition, text.inputs, params, run)


class _Seen(Fast):
    """Shows what every linear reads and returns, and goes on with what it is given back."""

    def __init__(self, part: Part, see: Callable[[Linear, Tensor, Tensor], Tensor]) -> None:
        super().__init__(part.module)
        self._linears = {linear.node: linear for linear in part.linears}
        self._see = see

    def run_node(self, n: Node) -> Any:
        made = super().run_node(n)
        linear = self._linears.get(n.name)
        if linear is None:
            return made
        args, _ = self.fetch_args_kwargs_from_env(n)
        return self._see(linear, args[0], made)
