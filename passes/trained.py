"""Weights while they are trained: their zeros stay zeros, and those on a grid stay on it."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .quantise import LEAST_STRENGTH, Gridded


class Trained:
    """The weights of some linears as what an optimiser may change, and as what the model runs with.

    A weight that is on a grid is trained as the float it was before, moved where it would else be rounded to another
    code, together with the clipping strengths of its groups: the model runs with what the grid makes of both, and the
    gradient passes straight through (`grid.quantise`).

    Args:
        params: weights by key.
        keys: what to train.
        quantised: the weights that are on a grid, by key.
    """

    def __init__(
        self, params: Mapping[str, Tensor], keys: Sequence[str], quantised: Mapping[str, Gridded] | None = None
    ) -> None:
        self._params = params
        self._on_grid = {key: quantised[key] for key in keys if quantised and key in quantised}
        grids = self._on_grid
        exact = {key: grids[key].near(params[key]) if key in grids else params[key] for key in keys}
        self.weights = {key: weight.detach().clone().requires_grad_() for key, weight in exact.items()}
        self.strengths = {key: its.strengths.clone().requires_grad_() for key, its in grids.items()}
        self.keep = {key: weight.detach() != 0 for key, weight in exact.items()}

    def live(self, *, learn: bool) -> dict[str, Tensor]:
        """All parameters as the model runs with them; differentiable in weights and strengths if it is to learn."""
        with torch.set_grad_enabled(learn):
            made = {
                key: replace(its, exact=self.weights[key], strengths=self.strengths[key]).value()
                for key, its in self._on_grid.items()
            }
        return {**self._params, **self.weights, **made}

    def step(self, optimizer: torch.optim.Optimizer, *, size: float = 1.0) -> None:
        """One step of the optimiser that has ``weights`` and ``strengths``; zeros stay.

        The gradients there are, are those of the loss times ``size``.
        """
        for key, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(~self.keep[key], 0.0).div_(size)
        for strength in self.strengths.values():
            if strength.grad is not None:
                strength.grad.div_(size)
        optimizer.step()
        optimizer.zero_grad()
        for strength in self.strengths.values():
            strength.data.clamp_min_(LEAST_STRENGTH)

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
        """What goes on from here: weights, strengths and the optimiser's moments."""
        state: dict[str, Tensor] = {f"weights/{key}": weight for key, weight in self.weights.items()}
        state |= {f"clipping/{key}": strength for key, strength in self.strengths.items()}
        for index, moments in optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{index}/{name}": value for name, value in moments.items()}
        return state

    def restore(self, state: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Go on from a `state`."""
        with torch.no_grad():
            for key, weight in self.weights.items():
                weight.copy_(state[f"weights/{key}"])
            for key, strength in self.strengths.items():
                strength.copy_(state[f"clipping/{key}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer/"):
                _, index, moment = name.split("/")
                moments.setdefault(int(index), {})[moment] = value
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
