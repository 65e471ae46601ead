"""BESA over one block: learn how much each row or linear loses from what the block's output loses.

Xu et al. 2024, "BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation". The
weights stay as they are, and so does the order in which a row loses them; the counts are learned by gradient from the
block's output and then repaired, so that the block prunes its share of the target to the weight.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..calibrate.besa import Learning, output_loss, rate_loss
from ..calibrate.prodigy import Prodigy
from ..calibrate.ranked import keep_mask, prune, ranks
from ..calibrate.rates import distribution, initial_logits, mean_rate
from ..calibrate.repair import exact_counts
from .block import Block
from .errors import InputError
from .fx.linears import Linear
from .fx.run import Values, run_part_with_grad


def learn_masks(
    block: Block,
    params: Mapping[str, Tensor],
    score: Mapping[str, Tensor],
    states: Sequence[Values],
    wanted: Sequence[Values],
    token_masks: Sequence[Tensor | None],
) -> dict[str, Tensor]:
    """Choose how many weights every row of a block loses.

    Args:
        block: the block; its pruned linears are learned, the others stay as they are.
        params: weights by key; not changed.
        score: what ranks the weights of a row, by key of the weight.
        states: live values of every calibration batch in front of the block; one batch is one step.
        wanted: for every batch the outputs that the pruned block is to reproduce.
        token_masks: for every batch which tokens count.

    Returns:
        Bool keep masks by key of the weight; exactly ``block.target`` False in all of them together.

    Raises:
        InputError: the loss is not finite.
    """
    learning = block.recipe.allocation
    assert learning is not None
    linears = {linear.weight: linear for linear in block.pruned}  # once each, where two share a weight
    size = sum(linear.out_features * linear.in_features for linear in linears.values())
    rate = block.target / size
    rank = {key: ranks(score[key]) for key in linears}
    logits = {
        key: initial_logits(
            linear.out_features if learning.per == "row" else 1, rate, steps=learning.rate_steps, width=learning.width
        ).requires_grad_()
        for key, linear in linears.items()
    }
    optimiser = _optimiser(list(logits.values()), learning)
    steps = learning.steps(len(states))
    for step in range(steps):
        index = step % len(states)
        tried = dict(params)
        expected: Tensor | float = 0.0
        for key, linear in linears.items():
            beta = distribution(logits[key], bounded=learning.bounded)
            alpha = mean_rate(beta)
            counts = (alpha.detach() * linear.in_features + 0.5).floor().int()
            tried[key] = prune(params[key], rank[key], beta, counts)
            expected = expected + alpha.mean() * (linear.out_features * linear.in_features / size)
        got = run_part_with_grad(block.part, states[index], tried, block.names)
        loss = learning.penalty * rate_loss(expected, rate)
        for name, value in wanted[index].items():
            loss = loss + output_loss(got[name], value, _tokens(token_masks[index], value))
        if not math.isfinite(float(loss.detach())):
            raise InputError(f"{block.part.path}: BESA's loss is {float(loss.detach())} after {step} of {steps} steps")
        optimiser.zero_grad()
        loss.backward()
        if learning.optimiser == "adamw":
            optimiser.param_groups[0]["lr"] = learning.step_size * (1 - step / steps)
        optimiser.step()
        block.progress(f"learning rates of {block.part.path}", step + 1, steps)
    rates = [_rates(logits[key].detach(), linear, learning) for key, linear in linears.items()]
    exact = exact_counts(rates, [linear.in_features for linear in linears.values()], block.target)
    return {key: keep_mask(rank[key], counts) for key, counts in zip(linears, exact, strict=True)}


def _optimiser(logits: list[Tensor], learning: Learning) -> torch.optim.Optimizer:
    if learning.optimiser == "prodigy":
        return Prodigy(logits, growth=learning.growth)
    return torch.optim.AdamW(logits, lr=learning.step_size, weight_decay=0.0)


def _rates(logits: Tensor, linear: Linear, learning: Learning) -> Tensor:
    """What was learned, as one rate a row."""
    return mean_rate(distribution(logits.double(), bounded=learning.bounded)).expand(linear.out_features)


def _tokens(mask: Tensor | None, value: Tensor) -> Tensor | None:
    return None if mask is None else mask.reshape(value.shape[:-1])
