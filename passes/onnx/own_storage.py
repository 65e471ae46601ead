"""How an ONNX file stores the weights of its linears, so that a pruned one need not store them larger."""

import math
from collections import Counter
from pathlib import Path
from typing import Literal

from .linears import find_linears
from .view import read_model


def own_dtype(path: Path) -> Literal["int8", "int4"] | None:
    """How a file stores most of the numbers of its linears' weights, where that is in 8 or 4 bits; else None.

    Raises:
        InputError: the file cannot be read.
    """
    numbers: Counter[int] = Counter()
    for linear in find_linears(read_model(path))[0]:
        numbers[linear.weight.bits if linear.weight.quantised else 32] += math.prod(linear.weight.shape)
    bits = max(numbers, key=lambda each: numbers[each], default=32)
    return "int8" if bits == 8 else "int4" if bits == 4 else None
