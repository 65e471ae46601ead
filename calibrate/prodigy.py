"""Prodigy: Adam that estimates its own step size."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Prodigy(torch.optim.Optimizer):
    r"""Adam whose step size is a growing estimate d of the distance to the solution.

    Mishchenko and Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", algorithm 4 (Adam
    version, step size 1, no weight decay), for gradients g, parameters x that started at :math:`x_0`, and
    :math:`\beta_3 = \sqrt{\beta_2}`:

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) d g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) d^2 g^2 \\
        r &\leftarrow \beta_3 r + d^2 \langle g, x_0 - x \rangle, \quad
        s \leftarrow \beta_3 s + d^2 g \\
        x &\leftarrow x - d \, m / (\sqrt v + d \epsilon), \quad
        d \leftarrow \max(d, \text{growth} \cdot r / \lVert s \rVert_1)

    ``growth`` is the factor that the authors' code calls ``d_coef``; the paper has 1. The sums are taken in float64, so
    that the number of threads does not show in the float32 step.

    Args:
        params: parameters to learn, as one group.
        growth: factor of the estimate.
        d0: first estimate.
        betas: decay of the two moments.
        eps: added to the denominator.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        growth: float = 1.0,
        d0: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"growth": growth, "d": d0, "r": 0.0, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step along the gradients."""
        assert closure is None
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        d, decay = group["d"], beta2**0.5
        group["r"] *= decay
        length = 0.0
        for x in group["params"]:
            state = self.state[x]
            if not state:
                state |= {"start": x.clone(), "m": torch.zeros_like(x), "v": torch.zeros_like(x)}
                state["s"] = torch.zeros_like(x, dtype=torch.float64)
            group["r"] += d * d * float((x.grad.double() * (state["start"] - x).double()).sum())
            state["s"].mul_(decay).add_(x.grad.double(), alpha=d * d)
            length += float(state["s"].abs().sum())
            state["m"].mul_(beta1).add_(x.grad, alpha=(1 - beta1) * d)
            state["v"].mul_(beta2).addcmul_(x.grad, x.grad, value=(1 - beta2) * d * d)
            x.sub_(d * state["m"] / (state["v"].sqrt() + d * group["eps"]))
        if length > 0:
            group["d"] = max(d, group["growth"] * group["r"] / length)
