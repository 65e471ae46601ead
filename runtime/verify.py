"""Prove that an exported file computes what the model computes: with our kernels, without them, and while decoding."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..passes.equivalence import Closeness, compare
from ..passes.errors import VerificationError
from ..passes.frontend.batches import Batch
from ..passes.frontend.trace import Traced
from ..passes.fx.partition import Partition
from ..passes.fx.run import run_part_float64, run_part_rounded, start
from .feeds import NUMPY
from .session import CausalSession, open_session

DECODED = 8
"""How many of the tokens are fed one by one, through the cache."""

WAYS = MappingProxyType({"kernels": True, "functions": False})

FACTOR = 4.0
"""How many times as wrong as float32 torch the file may be: ONNX Runtime sums in blocks of its own."""


@dataclass(frozen=True)
class Expected:
    """What the model returns for one batch, before it is lowered.

    Attributes:
        batch: the inputs.
        baseline: first output in float32, as torch computes it on rounded activations.
        exact: the same in float64, activations not rounded.
    """

    batch: Batch
    baseline: Tensor
    exact: Tensor


@dataclass(frozen=True)
class Verified:
    """One way of running the file, and how close it came."""

    how: str
    closeness: Closeness


def expect(
    partition: Partition,
    params: Mapping[str, Tensor],
    batch: Batch,
    rounded: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
) -> Expected:
    """Run the partitioned graph in float32 and in float64.

    Where ops round their activations (int8 and int4 weights: to 8 bits a token; bfloat16: to bfloat16), the float32 run
    does so too and thereby sets the budget, and the float64 run does not. Rounding in both would compare noise: an
    activation half-way between two codes falls to either side with the order of a sum, and what follows differs.

    Args:
        partition: the model.
        params: weights as the file will hold them: pruned, folded and rounded to their storage dtype.
        batch: held-out inputs.
        rounded: by the key of a weight, what its linear does to its activations first.
    """
    baseline, exact = start(partition, batch.inputs), start(partition, batch.inputs)
    for part in partition.parts:
        baseline.update(run_part_rounded(part, baseline, params, partition.params, rounded, fast=False))
        exact.update(run_part_float64(part, exact, params, partition.params))
    return Expected(batch, baseline[partition.outputs[0]], exact[partition.outputs[0]])


def verify(path: Path, traced: Traced, expected: Expected, ways: Mapping[str, bool] = WAYS) -> list[Verified]:
    """Run the file with the kernels and with its own functions, whole and (causal models) token by token.

    Args:
        path: the file.
        traced: the model.
        expected: what it returns.
        ways: what each way of running the file is called, and whether it is with our kernels.

    Raises:
        VerificationError: one of them is further from the truth than ``FACTOR`` times float32 torch, or is not finite.
    """
    results = []
    for how, kernels in ways.items():
        session = open_session(path, kernels=kernels)
        feed = _feed(session, traced, expected.batch)
        got = torch.from_numpy(session.run([traced.outputs[0]], feed)[0])
        results.append(Verified(how, compare(got, expected.baseline, expected.exact, factor=FACTOR)))
        if traced.kind == "causal":
            decoded = _decode(CausalSession(session), expected.batch)
            results.append(Verified(f"{how}, decoding", _tail(decoded, expected)))
    for result in results:
        if not result.closeness.ok:
            raise VerificationError(f"{path.name} differs from the model ({result.how}): {result.closeness}")
    return results


def _feed(session: Any, traced: Traced, batch: Batch) -> dict[str, Any]:
    """The inputs in the types that the file wants; those of bfloat16 models are float32 there."""
    wide = [x.float() if x.dtype == torch.bfloat16 else x for x in batch.inputs]
    types = {value.name: NUMPY[value.type] for value in session.get_inputs()}
    return {name: x.numpy().astype(types[name]) for name, x in zip(traced.inputs, wide, strict=True)}


def _decode(session: CausalSession, batch: Batch) -> Tensor:
    """Logits of the last tokens, each computed from the cache of those before it."""
    ids, mask = (x.numpy() for x in batch.inputs[:2])
    first = max(1, ids.shape[1] - DECODED)
    logits, past = session.step(ids[:, :first], mask[:, :first], session.empty_past(len(ids)))
    steps = [logits[:, -1:]]
    for end in range(first + 1, ids.shape[1] + 1):
        logits, past = session.step(ids[:, end - 1 : end], mask[:, :end], past)
        steps.append(logits)
    return torch.from_numpy(np.concatenate(steps, axis=1))


def _tail(decoded: Tensor, expected: Expected) -> Closeness:
    count = decoded.shape[1]
    return compare(decoded, expected.baseline[:, -count:], expected.exact[:, -count:], factor=FACTOR)
