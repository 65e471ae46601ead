"""Weights while they are trained: zeros stay or move as their pattern allows, and what is on a grid stays on it."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..calibrate.patterns import NM, Pattern, RowCounts
from ..calibrate.shadow import choose, masked
from .quantise import LEAST_STRENGTH, Gridded
from .recipe import Moves


class Trained:
    """The weights of some linears as what an optimiser may change, and as what the model runs with.

    A weight that is on a grid is trained as the float it was before, moved where it would else be rounded to another
    code, together with the clipping strengths of its groups: the model runs with what the grid makes of both, and the
    gradient passes straight through (`grid.quantise`).

    With ``moves`` the other weights have shadows: where the mask is False there is a number too, which the model does
    not see, but which learns what the gradient by the zero in its place says. See `shadow`.

    Args:
        params: weights by key.
        keys: what to train.
        quantised: the weights that are on a grid, by key.
        moves: how masks move; None where zeros stay. They stay on a grid in any case.
        patterns: the pattern that each weight was pruned to, by key. One without any keeps all of its weights.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        keys: Sequence[str],
        quantised: Mapping[str, Gridded] | None = None,
        moves: Moves | None = None,
        patterns: Mapping[str, Pattern] | None = None,
    ) -> None:
        self._params = params
        self._on_grid = {key: quantised[key] for key in keys if quantised and key in quantised}
        grids = self._on_grid
        exact = {key: grids[key].near(params[key]) if key in grids else params[key] for key in keys}
        self.weights = {key: weight.detach().clone().requires_grad_() for key, weight in exact.items()}
        self.strengths = {key: its.strengths.clone().requires_grad_() for key, its in grids.items()}
        self.keep = {key: weight.detach() != 0 for key, weight in exact.items()}
        self._moves = moves
        self._targets: dict[str, NM | RowCounts] = {}
        if moves is not None:
            for key in self.weights:
                if key not in grids and patterns is not None and key in patterns:
                    its = patterns[key]
                    self._targets[key] = its if isinstance(its, NM) else RowCounts((~self.keep[key]).sum(dim=1))
        self._first = {key: self.keep[key] for key in self._targets}
        self.frozen = not self._targets

    def live(self, *, learn: bool) -> dict[str, Tensor]:
        """All parameters as the model runs with them; differentiable in weights and strengths if it is to learn."""
        with torch.set_grad_enabled(learn):
            made = {
                key: replace(its, exact=self.weights[key], strengths=self.strengths[key]).value()
                for key, its in self._on_grid.items()
            }
            made |= {key: masked(self.weights[key], self.keep[key]) for key in self._targets}
        return {**self._params, **self.weights, **made}

    def step(self, optimizer: torch.optim.Optimizer, *, size: float = 1.0, factor: float = 1.0) -> None:
        """One step of the optimiser that has ``weights`` and ``strengths``; zeros stay, or are pulled to.

        The gradients there are, are those of the loss times ``size``; ``factor`` is the learning rate over its peak.
        """
        for key, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.div_(size)
                if self.frozen or key not in self._targets:
                    weight.grad.masked_fill_(~self.keep[key], 0.0)
        for strength in self.strengths.values():
            if strength.grad is not None:
                strength.grad.div_(size)
        optimizer.step()
        optimizer.zero_grad()
        for strength in self.strengths.values():
            strength.data.clamp_min_(LEAST_STRENGTH)
        if not self.frozen and self._moves is not None:
            for key in self._targets:
                shadow = self.weights[key].data
                shadow.mul_(torch.where(self.keep[key], 1.0, 1.0 - factor * self._moves.pull))

    def choose(self, optimizer: torch.optim.Optimizer) -> None:
        """Choose every mask again, from the shadows of now."""
        assert self._moves is not None
        for key, target in self._targets.items():
            state: Mapping[str, Any] = optimizer.state.get(self.weights[key], {})
            moment = state.get("exp_avg_sq") if self._moves.score == "fisher" else None
            self.keep[key] = choose(self.weights[key].detach(), target, moment)

    def freeze(self) -> None:
        """From here on zeros stay where they are, and nothing is behind them."""
        self.frozen = True
        for key in self._targets:
            self.weights[key].data.masked_fill_(~self.keep[key], 0.0)

    def moved(self) -> float | None:
        """Fraction of the kept weights of now that were pruned at first; None where none may move."""
        if not self._targets:
            return None
        new = sum(int((self.keep[key] & ~first).sum()) for key, first in self._first.items())
        return new / max(1, sum(int(first.sum()) for first in self._first.values()))

    def store(self, params: MutableMapping[str, Tensor], quantised: MutableMapping[str, Gridded] | None = None) -> None:
        """Put the weights of now into ``params``, and their grids into ``quantised``."""
        now = self.live(learn=False)
        for key, keep in self.keep.items():
            params[key] = torch.where(keep, now[key].detach(), 0.0) + 0.0  # never -0.0
        for key, its in self._on_grid.items():
            assert quantised is not None
            exact, strengths = self.weights[key].detach().clone(), self.strengths[key].detach().clone()
            quantised[key] = replace(its, exact=exact, strengths=strengths)

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """What goes on from here: weights, masks that move, strengths and the optimiser's moments."""
        state: dict[str, Tensor] = {f"weights/{key}": weight for key, weight in self.weights.items()}
        state |= {f"keep/{key}": self.keep[key] for key in self._targets}
        state |= {f"clipping/{key}": strength for key, strength in self.strengths.items()}
        for index, moments in optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{index}/{name}": value for name, value in moments.items()}
        return state

    def restore(self, state: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Go on from a `state`; whether masks move still is said by whoever calls."""
        with torch.no_grad():
            for key, weight in self.weights.items():
                weight.copy_(state[f"weights/{key}"])
            for key, strength in self.strengths.items():
                strength.copy_(state[f"clipping/{key}"])
        self.keep |= {key: state[f"keep/{key}"] for key in self._targets}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer/"):
                _, index, moment = name.split("/")
                moments.setdefault(int(index), {})[moment] = value
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
