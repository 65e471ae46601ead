"""How much the loss grows when a linear changes, estimated for any change of any linear from one backward pass."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..calibrate.matmul import linear as product
from ..calibrate.statistics import ActNorm
from .errors import InputError
from .frontend.batches import Batch
from .fx.linears import Linear
from .fx.partition import Part, Partition
from .fx.run import Values, run_model, run_part_changed
from .mapped import mapped
from .outputs import Output
from .recipe import Progress

TOKENS = 1024
"""How many tokens changes are judged on; norms are those of all that are looked at."""
Rounding = Callable[[Tensor], Tensor]


Site: TypeAlias = tuple[int, str]
"""One linear in the graph: which of the blocks it is in, and its node there. One module may run at several."""


@dataclass(frozen=True)
class Witness:
    """What linears read at some tokens, and what their outputs meant for the loss there.

    Attributes:
        sources: what each linear reads: linears that read the same share it.
        inputs: x, ``[tokens, in_features]``, by source.
        gradients: g, ``[tokens, out_features]``, scaled so that the sum of (g'change)^2 is the damage.
        norms: of the inputs over all tokens that were looked at, by source.
    """

    sources: Mapping[Site, Site]
    inputs: Mapping[Site, Tensor]
    gradients: Mapping[Site, Tensor]
    norms: Mapping[Site, Tensor]

    def norm(self, sites: Sequence[Site]) -> Tensor:
        """The activation norms of linears of one weight together, ``[in_features]``."""
        norms = [self.norms[self.sources[site]] for site in sites]
        return norms[0] if len(norms) == 1 else torch.stack(norms).norm(dim=0)

    def damage(self, site: Site, weight: Tensor, changed: Iterable[tuple[Tensor, Rounding]]) -> list[float]:
        r"""The damage of giving a linear other weights, alone.

        With x what the linear reads at a token t, r what becomes of x, W' another weight, and g the gradient of the
        loss by its output there,

        .. math:: d = \frac{1}{2n} \sum_t \bigl( g_t^\top (W' r(x_t) - W x_t) \bigr)^2

        For logits the loss is the surprise at tokens drawn from what the model itself predicts; then d is the
        second-order term of KL(model, changed model) in nats a token (Amari 1998, "Natural Gradient Works Efficiently
        in Learning"; the terms between two tokens are left out, whose mean is small and whose noise is not). For
        values y the loss is v'y with random v, and d is the squared error of y over the squared norm of y.

        Args:
            site: of the linear.
            weight: W, ``[out_features, in_features]``.
            changed: W', and r.
        """
        x, gradient = self.inputs[self.sources[site]], self.gradients[site]
        before = product(x, weight.float())
        return [
            float((gradient * (product(rounding(x), new) - before)).sum(-1).double().square().sum())
            for new, rounding in changed
        ]


def witness(
    partition: Partition,
    params: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    output: Output,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Witness:
    """Run every text forward and backward through the whole model, and keep what `Witness` says.

    Args:
        partition: the model.
        params: its weights by key.
        batches: what to look at, one text at a time.
        output: what the model's first output is.
        seed: of the tokens that the loss is about, or of v, and of the tokens that are kept.
        progress: told about every text.

    Raises:
        InputError: no token counts, activations hold NaN, or a linear does not reach the model's output.
    """
    texts = [text for batch in batches for text in batch.texts()]
    linears = {(place, x.node): x for place, part in enumerate(partition.blocks) for x in part.linears}
    sources: dict[Site, Site] = {}
    first: dict[Site, Site] = {}
    for (place, node), linear in linears.items():
        sources[place, node] = first.setdefault((place, linear.input), (place, node))
    norms = {site: ActNorm(linears[site].in_features) for site in first.values()}
    inputs: dict[Site, list[Tensor]] = {site: [] for site in first.values()}
    gradients: dict[Site, list[Tensor]] = {site: [] for site in linears}
    generator, size = torch.Generator().manual_seed(seed), 0.0
    most = -(-TOKENS // max(1, len(texts)))
    for done, text in enumerate(texts):
        progress("estimating damage", done, len(texts))
        seen, counted = _look(partition, params, text, output, generator)
        size += counted
        rows: dict[int, Tensor] = {}
        for site, (x, gradient) in seen.items():
            x, gradient = text.counted(x.float()), text.counted(gradient)
            if len(x) not in rows:
                rows[len(x)] = torch.randperm(len(x), generator=generator)[:most]
            own = rows[len(x)]
            gradients[site].append(gradient[own] * (len(x) / max(1, len(own))) ** 0.5)
            if site in norms:
                _count(norms[site], linears[site].path, x)
                inputs[site].append(x[own])
    if not size:
        raise InputError("no token of the calibration batches counts, so no damage can be estimated")
    factor = (0.5 / size if output == "logits" else 1 / size) ** 0.5
    return Witness(
        sources,
        {site: mapped(torch.cat(found)) for site, found in inputs.items()},
        {site: mapped(torch.cat(found) * factor) for site, found in gradients.items()},
        {site: its.norm() for site, its in norms.items()},
    )


def _look(
    partition: Partition, params: Mapping[str, Tensor], text: Batch, output: Output, generator: torch.Generator
) -> tuple[dict[Site, tuple[Tensor, Tensor]], float]:
    """What every linear reads and the gradient by what it makes; and tokens, or the output's energy."""
    seen: dict[Site, tuple[Tensor, Tensor]] = {}
    paths: dict[Site, str] = {}
    places = {id(part): place for place, part in enumerate(partition.blocks)}

    def run(part: Part, values: Values, params: Mapping[str, Tensor], names: Mapping[str, str]) -> Values:
        def probe(linear: Linear, x: Tensor, y: Tensor) -> Tensor:
            if id(part) not in places:
                return y
            site = (places[id(part)], linear.node)
            nothing = torch.zeros_like(y, requires_grad=True)
            seen[site], paths[site] = (x.detach(), nothing), linear.path
            return y + nothing

        return run_part_changed(part, values, params, names, probe)

    with torch.enable_grad():
        made = run_model(partition, text.inputs, params, run)
        rows = text.counted(made.float())
        if output == "logits":
            drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator) if len(rows) else rows.long()
            loss = -rows.log_softmax(-1).gather(-1, drawn).sum()
            size = float(len(rows))
        else:
            loss = (rows * torch.randn(rows.shape, generator=generator)).sum()
            size = float(rows.detach().square().sum())
    gradients = torch.autograd.grad(loss, [nothing for _, nothing in seen.values()], allow_unused=True)
    found = {}
    for (site, (x, _)), gradient in zip(seen.items(), gradients, strict=True):
        if gradient is None:
            raise InputError(
                f"{paths[site]} does not reach the model's first output, so its damage cannot be estimated"
            )
        found[site] = (x, gradient.float())
    return found, size


def _count(norm: ActNorm, path: str, x: Tensor) -> None:
    try:
        norm.update(x)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
