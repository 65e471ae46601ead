"""Find the channel orders of a block in which an N:M mask keeps the most score, and fold them into its weights."""

from collections.abc import MutableMapping

from torch import Tensor

from ..calibrate.patterns import NM
from ..calibrate.permute import find_order
from .block import Block, Observed
from .equivalence import compare
from .errors import VerificationError
from .frontend.trace import PREFIX
from .fx.channels import ChannelSpace, find_channel_spaces
from .fx.experts import by_expert
from .fx.fold import aligned, apply_fold, permute_statistic, stack_scores
from .fx.run import Values, run_part, run_part_float64
from .recipe import FoldReport


def permute(
    block: Block,
    params: MutableMapping[str, Tensor],
    score: MutableMapping[str, Tensor],
    observed: Observed,
    check: Values,
) -> list[FoldReport]:
    """Find and fold the channel orders that keep the most score; score and statistics move along with the weights.

    Before:  y = W2 f(W1 x)                     f acts on every channel alike
    After:   y = W2[:, p] f(W1[p] x)            p puts the channels that compete for a group far apart
             experts of one stack each get an order of their own
    Left alone: spaces whose consumers are not pruned, or to several patterns, or do not start at a multiple of m.
    Numerics: the same products; only the sum over the channels runs in another order. Checked in float64: in float32,
        where one channel is a thousand times the others, its place in the sum alone moves the error fourfold.

    Raises:
        VerificationError: a fold changed what the block computes.
    """
    if block.recipe.permute == "none" or not any(isinstance(block.pattern(key), NM) for key in score):
        return []
    timings = block.timings
    with timings.stage("channel spaces"):
        spaces = _channel_spaces(block)
    folds = []
    expected: tuple[Values, Values] | None = None
    readers = {node: x.weight for x in reversed(block.pruned) for node in (x.input, x.node)}
    for space in spaces:
        chosen = {block.pattern(c.param) for c in space.consumers if c.param in score}
        pattern = chosen.pop() if len(chosen) == 1 else None
        if not isinstance(pattern, NM):
            continue
        with timings.stage("permutation search"):
            found = {
                own: find_order(stack_scores(own, score), pattern)
                for own in by_expert(space)
                if aligned(own, pattern.m) and any(c.param in score for c in own.consumers)
            }
        found = {own: its for own, its in found.items() if not its.is_identity}
        if not found:
            continue
        with timings.stage("fold"):
            folded = dict(params)
            for own, its in found.items():
                apply_fold(own, its.order, folded)
            if expected is None:
                plain = run_part(block.part, check, params, block.names)
                expected = plain, run_part_float64(block.part, check, params, block.names)
            got = run_part_float64(block.part, check, folded, block.names)
            _check_outputs(block, space, got, *expected)
            params.update(folded)
            for own, its in found.items():
                apply_fold(own, its.order, score, only_present=True)
                moved = {consumer.param for consumer in own.consumers}
                for statistics in (observed.norms, observed.hessians):
                    for node in [node for node in statistics if readers[node] in moved]:
                        statistics[node] = permute_statistic(own, its.order, statistics[node], readers[node])
        for own, its in found.items():
            name = own.name.removeprefix(PREFIX)
            folds.append(FoldReport(name, own.size, its.retained_before, its.retained_after))
    return folds


def _channel_spaces(block: Block) -> list[ChannelSpace]:
    """The spaces of the block. A weight that another block reads as well must not move: no check would see it."""
    module = block.part.module
    inner = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    arguments = list(zip(inner, block.part.inputs, strict=True))
    own = {n: block.names[o] for n, o in arguments if o in block.names and o not in block.shared}
    inside = {outer: inner for inner, outer in arguments}  # the names that the block's own graph uses
    results = module.graph.output_node().args[0]
    results = results if isinstance(results, tuple | list) else (results,)
    inside |= {name: node.name for name, node in zip(block.part.outputs, results, strict=True) if name}
    cache = [(inside[a], inside[b]) for a, b in block.cache if a in inside and b in inside]
    return find_channel_spaces(module, own, cache=cache)


def _check_outputs(block: Block, space: ChannelSpace, got: Values, plain: Values, exact: Values) -> None:
    for name in block.judged:
        if isinstance(got[name], Tensor) and got[name].is_floating_point():
            close = compare(got[name].to(plain[name].dtype), plain[name], exact[name], factor=4.0)
            if not close.ok:
                raise VerificationError(f"{block.part.path}: folding {space.name} changed its output: {close}")
