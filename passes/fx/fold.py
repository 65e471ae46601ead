"""Move the channels of a space into a new order, in the parameters."""

from collections.abc import Mapping, MutableMapping

import torch

from .channels import ChannelSpace


def apply_fold(
    space: ChannelSpace,
    order: torch.Tensor,
    params: MutableMapping[str, torch.Tensor],
    *,
    only_present: bool = False,
) -> None:
    """Put the channels of a space into a new order: new channel ``j`` is old channel ``order[j]``.

    Before:  y = down(silu(gate(x)) * up(x))
    After:   the same, with gate.weight[order], up.weight[order] and down.weight[:, order]: no operation at run time.
    Left alone: every parameter and every entry outside the ranges of the space. A range that is producer and
    consumer at once (a tied embedding) moves once.
    Numerics: the same products; the consumers sum them in another order, so equal up to float error.

    Args:
        space: from ``find_channel_spaces``.
        order: ``[space.size]`` integers, a permutation.
        params: tensors by fully qualified name. The entries that the space touches are replaced by new
            tensors; no tensor is written to, so whoever else holds the old ones is not affected.
        only_present: move what ``params`` holds and nothing else. For scores and masks, which exist for some of
            the weights only; a model folded like this would be wrong.

    Raises:
        ValueError: ``order`` is not a permutation of the space's channels, or a parameter is too small or, unless
            ``only_present``, missing. Nothing has been replaced then.
    """
    order = _permutation(space, order)
    folded: dict[str, torch.Tensor] = {}
    for moved in dict.fromkeys((*space.producers, *space.consumers)):
        if moved.param not in params:
            if only_present:
                continue
            raise ValueError(f"{space.name}: parameter {moved.param} is missing")
        old = folded.get(moved.param, params[moved.param])
        if moved.dim >= old.dim() or moved.start + moved.size > old.shape[moved.dim]:
            raise ValueError(
                f"{space.name}: {moved.param} has shape {tuple(old.shape)}, need {moved.start + moved.size} "
                f"entries along dimension {moved.dim}"
            )
        index = torch.arange(old.shape[moved.dim], device=old.device)
        index[moved.start : moved.start + moved.size] = order.to(old.device) + moved.start
        folded[moved.param] = old.detach().index_select(moved.dim, index)
    params.update(folded)


def permute_statistic(space: ChannelSpace, order: torch.Tensor, statistic: torch.Tensor, consumer: str) -> torch.Tensor:
    """Return a statistic of a consumer's input in the order that ``apply_fold`` gives the input.

    Args:
        space: from ``find_channel_spaces``.
        order: as given to ``apply_fold``.
        statistic: one entry (norms, ``[in_features]``) or one row and column (Hessian,
            ``[in_features, in_features]``) for each input feature.
        consumer: the weight whose input was observed. A name that is no consumer of the space is not moved.

    Raises:
        ValueError: ``order`` is not a permutation of the space's channels, or the statistic is of another shape.
    """
    order = _permutation(space, order)
    features = statistic.shape[0] if statistic.dim() else 0
    if any(size != features for size in statistic.shape) or statistic.dim() not in (1, 2):
        raise ValueError(f"{consumer}: a statistic is [features] or [features, features], got {tuple(statistic.shape)}")
    index = torch.arange(features, device=statistic.device)
    for moved in space.consumers:
        if moved.param == consumer:
            if moved.start + moved.size > features:
                raise ValueError(f"{consumer}: {features} input features, the space needs {moved.start + moved.size}")
            index[moved.start : moved.start + moved.size] = order.to(statistic.device) + moved.start
    return statistic[index] if statistic.dim() == 1 else statistic[index][:, index]


def stack_scores(space: ChannelSpace, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the scores of every consumer's columns as rows of one matrix, in the order of the space's channels.

    All rows share one order, so the search for it sees one score, whatever linears and heads they come from.

    Args:
        space: from ``find_channel_spaces``.
        scores: one score for each entry of each consumer, by parameter name. Consumers that are not here (they
            are not pruned) have no say.

    Returns:
        ``[R, space.size]`` float32.

    Raises:
        ValueError: no consumer has a score.
    """
    slices = [
        scores[r.param].movedim(r.dim, -1)[:, r.start : r.start + r.size].float()
        for r in space.consumers
        if r.param in scores
    ]
    if not slices:
        raise ValueError(f"{space.name}: no score for any consumer")
    return torch.cat(slices)


def aligned(space: ChannelSpace, m: int) -> bool:
    """Whether the space's channels are whole groups of ``m`` neighbours in every consumer.

    Only then does an N:M mask of a consumer see one score for each group, and an order moves whole groups'
    worth of channels without touching a group that other channels share.
    """
    return space.size % m == 0 and all(consumer.start % m == 0 for consumer in space.consumers)


def _permutation(space: ChannelSpace, order: torch.Tensor) -> torch.Tensor:
    if order.shape != (space.size,):
        raise ValueError(f"{space.name}: order must have shape ({space.size},), got {tuple(order.shape)}")
    if order.is_floating_point() or not torch.equal(order.sort().values.cpu(), torch.arange(space.size)):
        raise ValueError(f"{space.name}: order is not a permutation of 0..{space.size - 1}")
    return order
