"""How packed values are stored: rounded once, and never to infinity."""

import torch
from torch import Tensor


def to_storage(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``values`` to ``dtype``; what rounds to zero becomes +0.0.

    Raises:
        ValueError: a finite value would become infinite (float16 ends at 65504).
    """
    stored = values.to(dtype)
    lost = stored.isinf() & values.isfinite()
    if bool(lost.any()):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{values[lost][0].item():g} does not fit {name}, which ends at {torch.finfo(dtype).max:g}")
    return stored.masked_fill(stored == 0, 0.0)
