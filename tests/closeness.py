"""Kernel results against float64, within what the plain expression in its dtype gets wrong."""

import numpy as np
import torch
from sparsify_export.passes.equivalence import compare


def assert_close(got, x, dense, bias=None, dtype="f32"):
    """Fail unless ``got`` is as close to ``x @ dense.T + bias`` as a plain float32 sum, taken four times.

    The plain sum goes over the columns in both orders, and the worse counts. With bfloat16 weights and more than two
    tokens the plain expression has x in bfloat16 too.
    """
    exact = x.astype(np.float64) @ dense.T
    plain_x = (torch.from_numpy(x).bfloat16().float().numpy() if dtype == "bf16" and len(x) > 2 else x).astype(
        np.float32
    )
    baseline = exact
    for order in (range(x.shape[1]), reversed(range(x.shape[1]))):
        plain = np.zeros(exact.shape, np.float32)
        for k in order:
            plain += np.multiply.outer(plain_x[:, k], dense[:, k].astype(np.float32))
        baseline = np.where(abs(plain - exact) >= abs(baseline - exact), plain, baseline)
    if bias is not None:
        exact, baseline = exact + bias, baseline + bias
    closeness = compare(torch.from_numpy(got), torch.from_numpy(baseline), torch.from_numpy(exact), factor=4.0)
    assert closeness.ok, str(closeness)


def quantised_tokens(x):
    """Every token as its 8-bit codes times their step, in float64; the codes are made in float32."""
    step = abs(x).max(axis=1, keepdims=True, initial=0) / np.float32(127)
    tiny = step < np.finfo(np.float32).tiny
    codes = np.rint(x / np.where(tiny, np.float32(1), step))
    return np.where(tiny, 0.0, codes.astype(np.float64) * step)
