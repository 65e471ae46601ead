"""How an ONNX file stores the weights of its linears, so that a pruned one need not store them larger."""

import math
from collections import Counter
from pathlib import Path

from ..dialect.storage import GROUPS, Storage
from .linears import find_linears
from .view import read_model

GROUP = 128
"""Columns that share a scale of 4 bits, where nobody says how many."""


def own_storage(path: Path) -> Storage | None:
    """How a file stores most of the numbers of its linears' weights, where that is in 8 or 4 bits; else None.

    Groups of 4 bits are those of the file, where our ops have them.

    Raises:
        InputError: the file cannot be read.
    """
    numbers: Counter[int] = Counter()
    groups: Counter[int] = Counter()
    for linear in find_linears(read_model(path))[0]:
        weight = linear.weight
        size = math.prod(weight.shape)
        numbers[weight.bits if weight.quantised else 32] += size
        if weight.quantised and weight.bits == 4:
            groups[weight.group] += size
    bits = max(numbers, key=lambda each: numbers[each], default=32)
    if bits == 8:
        return Storage("int8")
    if bits != 4:
        return None
    own = max(groups, key=lambda each: groups[each])
    return Storage("int4", own if own in GROUPS else GROUP)
