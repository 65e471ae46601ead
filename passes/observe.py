"""Run a dense block on the calibration batches and look at what its linears read."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..calibrate.hessian import Hessian
from ..calibrate.statistics import ActNorm
from .block import Block, Observed
from .errors import InputError
from .frontend.batches import Batch
from .fx.attended import Attended, averages
from .fx.experts import TOKENS_OF
from .fx.run import Values, observe_part


def observe(block: Block, params: Mapping[str, Tensor], states: list[Values], batches: Sequence[Batch]) -> Observed:
    """Run the dense block on every batch, looking at what its linears read.

    Raises:
        InputError: activations hold NaN, or the batches hold nothing but padding.
    """
    seen = _Statistics(block)
    outputs = []
    for values, batch in zip(states, batches, strict=True):
        seen.token_mask = batch.token_mask
        look = {node: partial(seen.read, node) for node in seen.inputs}
        before: dict[str, Any] = {its.attention: partial(seen.attend, its) for its in seen.attended}
        before |= {node: partial(seen.route, node) for node in seen.experts}
        results = observe_part(block.part, values, params, block.names, look, before)
        outputs.append({name: value for name, value in results.items() if name in block.judged})
    for told in seen.pool():
        block.note(told)
    norms, hessians = seen.done()
    return Observed(norms, hessians, outputs)


class _Statistics:
    """The statistics of a block while they are collected.

    Attributes:
        inputs: of what linears read, by node.
        attended: the linears with statistics of their own, because of the attention behind them.
        experts: the nodes among ``inputs`` that are the tokens of one expert, and what its stack reads.
        token_mask: which tokens of the batch that is running count; None for all.
    """

    def __init__(self, block: Block) -> None:
        recipe = block.recipe
        sweeps = recipe.quantise is not None and recipe.quantise.method != "rtn"
        plain = recipe.update == "none" and recipe.score != "hessian" and not sweeps
        kind: type[ActNorm] | type[Hessian] = ActNorm if plain else Hessian
        self.inputs = {linear.input: kind(linear.in_features) for linear in block.pruned}
        self.attended = [] if plain else [block.attended[x.node] for x in block.pruned if x.node in block.attended]
        self.token_mask: Tensor | None = None
        self._paths = {x.input: x.path for x in reversed(block.pruned)} | {x.node: x.path for x in block.pruned}
        self._own = {x.node: Hessian(x.in_features) for x in block.pruned if x.node in block.attended and not plain}
        self._latest: dict[str, Tensor] = {}
        nodes = {node.name: node for node in block.part.module.graph.nodes}
        routed = [name for name in self.inputs if nodes[name].target is TOKENS_OF]
        self.experts = {name: (str(nodes[name].args[0]), str(nodes[name].args[1])) for name in routed}
        self._asking: dict[str, Tensor] = {}

    def route(self, node: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember which rows of what a stack of experts reads go to this expert."""
        _, ids, expert = args
        self._asking[node] = ids == expert

    def read(self, node: str, x: Tensor) -> None:
        """Count what linears read."""
        if node in self.experts:
            return self._count(self.inputs[node], node, x, self._routed(node, x))
        self._latest[node] = x
        self._count(self.inputs[node], node, x, self._tokens(x))

    def _routed(self, node: str, x: Tensor) -> Tensor:
        """Which rows of an expert count: no padding, and no zeros, which stand for what was not chosen."""
        asking, some = self._asking.pop(node), (x != 0).any(dim=1)
        if self.token_mask is None:
            return some
        copies, rest = divmod(len(asking), self.token_mask.numel())
        if rest:
            raise InputError(
                f"{self._paths[node]}: its stack of experts reads {len(asking)} rows, which are no whole number for "
                f"each of {self.token_mask.numel()} tokens, so padding cannot be told from text"
            )
        return self.token_mask.reshape(-1).bool().repeat_interleave(copies)[asking] & some

    def pool(self) -> list[str]:
        """Give experts that saw fewer tokens than they have inputs the statistics of their whole stack; tells which."""
        stacks: dict[tuple[str, str], list[str]] = {}
        for node, stack in self.experts.items():
            stacks.setdefault(stack, []).append(node)
        told = []
        for nodes in stacks.values():
            poor = [node for node in nodes if self.inputs[node].tokens < self.inputs[node].in_features]
            if not poor:
                continue
            pooled = type(self.inputs[nodes[0]])(self.inputs[nodes[0]].in_features)
            for node in nodes:
                pooled.add(self.inputs[node])  # type: ignore[arg-type]
            least = min(poor, key=lambda node: self.inputs[node].tokens)
            told.append(
                f"{len(poor)} of the {len(nodes)} experts of {self._paths[nodes[0]].rpartition('.')[0]} were given "
                f"fewer tokens of calibration than they have inputs ({pooled.in_features}), {self._paths[least]} "
                f"the fewest ({self.inputs[least].tokens}): these are fitted to the {pooled.tokens} tokens of "
                "all experts; give more text"
            )
            self.inputs |= dict.fromkeys(poor, pooled)
        return told

    def attend(self, its: Attended, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count what an attention makes of what a linear read."""
        x = self._latest[its.input]
        tokens = self._tokens(x)
        queries = None if tokens is None else tokens.bool()
        self._count(self._own[its.node], its.node, averages(args, kwargs, x, queries), None)

    def done(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Norms and second moments, by node."""
        self._latest.clear()
        norms = {}
        for node, statistic in self.inputs.items():
            try:
                norms[node] = statistic.norm()
            except ValueError as error:
                raise InputError(f"{self._paths[node]}: {error}") from error
        hessians = {node: found.matrix() for node, found in self.inputs.items() if isinstance(found, Hessian)}
        return norms, hessians | {node: found.matrix() for node, found in self._own.items()}

    def _tokens(self, x: Tensor) -> Tensor | None:
        """Which rows of an input count: what has another size than the text, as pictures beside it, has no padding."""
        if self.token_mask is None or self.token_mask.numel() != x.shape[:-1].numel():
            return None
        return self.token_mask.reshape(x.shape[:-1])

    def _count(self, statistic: ActNorm | Hessian, node: str, x: Tensor, tokens: Tensor | None) -> None:
        try:
            statistic.update(x, tokens)
        except ValueError as error:
            raise InputError(f"{self._paths[node]}: {error}") from error
