"""BESA over one block: learn how much each row or linear loses from what the block's output loses.

Xu et al. 2024, "BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation". The
weights stay as they are, and so does the order in which a row loses them; the counts are learned by gradient from the
block's output and then repaired, so that the block prunes its share of the target to the weight.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..calibrate import choice, ranked
from ..calibrate.besa import Learning, output_loss, rate_loss
from ..calibrate.patterns import NM
from ..calibrate.prodigy import Prodigy
from ..calibrate.rates import distribution, initial_logits, mean_rate
from ..calibrate.repair import exact_counts
from .block import Block
from .errors import InputError
from .fx.linears import Linear
from .fx.run import Values, run_part_with_grad
from .quantise import LEAST_STRENGTH, STRENGTH_RATE, Gridded, first_grids

Prune = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a weight's key, the weight and its logits: the weight as pruned, and its mean rate; differentiable in both."""


@dataclass(frozen=True)
class Learned:
    """What was learned of a block's weights, by key.

    Attributes:
        keep: bool masks.
        grids: of the dense weights, where their strengths were learned together with the rates; else empty.
        picks: the pattern of each weight, where patterns were learned, None for dense; else empty.
    """

    keep: dict[str, Tensor]
    grids: dict[str, Gridded]
    picks: dict[str, NM | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Examples:
    """What a block is to reproduce, by calibration batch.

    Attributes:
        states: live values in front of the block.
        wanted: outputs that the pruned block is compared with.
        token_masks: which tokens count; None for all.
    """

    states: Sequence[Values]
    wanted: Sequence[Values]
    token_masks: Sequence[Tensor | None]


def learn_masks(block: Block, params: Mapping[str, Tensor], score: Mapping[str, Tensor], examples: Examples) -> Learned:
    """Choose how many weights every row of a block loses, or which pattern every linear gets.

    Joint quantisation (section 3.3 of the paper) learns in the same loss how much every group of columns is clipped
    when it is quantised: the weight is quantised first and pruned then. The grid is ours, symmetric around 0, with one
    strength a group where the paper has one for either end.

    Args:
        block: the block; its pruned linears are learned, the others stay as they are.
        params: weights by key; not changed.
        score: what ranks the weights, by key of the weight.
        examples: what to learn from; one batch is one step.

    Returns:
        Keep masks and grids. All masks together have exactly ``block.target`` False, or with patterns at least
        that many.

    Raises:
        InputError: the loss is not finite, or no choice of patterns prunes enough.
    """
    learning = block.recipe.allocation
    assert learning is not None
    linears = {linear.weight: linear for linear in block.pruned}  # once each, where two share a weight
    if not linears:
        return Learned({}, {})  # all of the block stays dense
    if learning.per == "pattern":
        return _learn_patterns(block, linears, params, score, examples, learning)
    return _learn_counts(block, linears, params, score, examples, learning)


def _learn_counts(
    block: Block,
    linears: Mapping[str, Linear],
    params: Mapping[str, Tensor],
    score: Mapping[str, Tensor],
    examples: Examples,
    learning: Learning,
) -> Learned:
    rate = block.target / _size(linears)
    rank = {key: ranked.ranks(score[key]) for key in linears}
    logits = {}
    for key, linear in linears.items():
        groups = linear.out_features if learning.per == "row" else 1
        logits[key] = initial_logits(groups, rate, steps=learning.rate_steps, width=learning.width)

    def pruned(key: str, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        beta = distribution(z, bounded=learning.bounded)
        alpha = mean_rate(beta)
        counts = (alpha.detach() * linears[key].in_features + 0.5).floor().int()
        return ranked.prune(weight, rank[key], beta, counts), alpha.mean()

    learned, grids = _learn(block, linears, params, examples, learning, logits, pruned)
    rates = []
    for key, linear in linears.items():
        alpha = mean_rate(distribution(learned[key].double(), bounded=learning.bounded))
        rates.append(alpha.clamp(0, 1).expand(linear.out_features))
    counts = exact_counts(rates, [linear.in_features for linear in linears.values()], block.target)
    keep = {key: ranked.keep_mask(rank[key], count) for key, count in zip(linears, counts, strict=True)}
    return Learned(keep, grids)


def _learn_patterns(
    block: Block,
    linears: Mapping[str, Linear],
    params: Mapping[str, Tensor],
    score: Mapping[str, Tensor],
    examples: Examples,
    learning: Learning,
) -> Learned:
    rate = block.target / _size(linears)
    candidates: dict[str, list[NM | None]] = {}
    for key, linear in linears.items():
        candidates[key] = choice.usable(learning.patterns, linear.in_features)
    codes = {key: choice.keep_codes(score[key], candidates[key]) for key in linears}
    logits = {key: choice.start_near(candidates[key], rate) for key in linears}

    def pruned(key: str, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        beta = distribution(z)
        return choice.prune(weight, codes[key], beta), beta[0] @ torch.tensor(choice.sparsities(candidates[key]))

    learned, grids = _learn(block, linears, params, examples, learning, logits, pruned)
    sizes = {key: linear.out_features * linear.in_features for key, linear in linears.items()}
    likelihood = [learned[key][0].double().log_softmax(dim=0).tolist() for key in linears]
    prunes = [[round(size * s) for s in choice.sparsities(candidates[key])] for key, size in sizes.items()]
    try:
        picks = choice.choose(likelihood, prunes, block.target)
    except ValueError as error:
        raise InputError(f"{block.part.path}: {error}") from error
    keep = {key: choice.kept(codes[key], pick) for key, pick in zip(linears, picks, strict=True)}
    return Learned(keep, grids, {key: candidates[key][pick] for key, pick in zip(linears, picks, strict=True)})


def _learn(
    block: Block,
    linears: Mapping[str, Linear],
    params: Mapping[str, Tensor],
    examples: Examples,
    learning: Learning,
    logits: Mapping[str, Tensor],
    pruned: Prune,
) -> tuple[dict[str, Tensor], dict[str, Gridded]]:
    """Learn the logits, and with joint quantisation the strengths; one batch a step.

    The loss is that of the block's output and the penalty on its sparsity.
    """
    size = _size(linears)
    rate = block.target / size
    logits = {key: z.requires_grad_() for key, z in logits.items()}
    grids = first_grids(block, linears, params)
    strengths = {key: its.strengths.clone().requires_grad_() for key, its in grids.items()}
    optimiser: torch.optim.Optimizer
    if learning.optimiser == "prodigy":
        optimiser = Prodigy([*logits.values(), *strengths.values()], growth=learning.growth)
    else:
        groups = [{"params": list(logits.values()), "lr": learning.step_size}]
        groups += [{"params": list(strengths.values()), "lr": STRENGTH_RATE}] if strengths else []
        optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    peaks = [group.get("lr", 0.0) for group in optimiser.param_groups]  # Prodigy has none
    count = len(examples.states)
    steps = learning.steps(count)
    for step in range(steps):
        tried = dict(params)
        expected = torch.zeros(())
        for key, linear in linears.items():
            weight = replace(grids[key], strengths=strengths[key]).value() if key in grids else params[key]
            tried[key], alpha = pruned(key, weight, logits[key])
            expected = expected + alpha * (linear.out_features * linear.in_features / size)
        got = run_part_with_grad(block.part, examples.states[step % count], tried, block.names)
        loss = learning.penalty * rate_loss(expected, rate)
        mask = examples.token_masks[step % count]
        for name, value in examples.wanted[step % count].items():
            if isinstance(value, Tensor) and value.is_floating_point():
                tokens = None if mask is None else mask.reshape(value.shape[:-1])
                loss = loss + output_loss(got[name], value, tokens)
        if not math.isfinite(float(loss.detach())):
            raise InputError(f"{block.part.path}: BESA's loss is {float(loss.detach())} after {step} of {steps} steps")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if learning.optimiser == "adamw":
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * (1 - step / steps)
        optimiser.step()
        for strength in strengths.values():
            strength.data.clamp_min_(LEAST_STRENGTH)
        block.progress(f"learning rates of {block.part.path}", step + 1, steps)
    grids = {key: replace(its, strengths=strengths[key].detach()) for key, its in grids.items()}
    return {key: z.detach() for key, z in logits.items()}, grids


def _size(linears: Mapping[str, Linear]) -> int:
    return sum(linear.out_features * linear.in_features for linear in linears.values())
