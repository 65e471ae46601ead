"""Networks small enough to follow by hand, exported and canonical, for the tests of single passes."""

import torch
from sparsify_export.passes.fx.canonical import canonicalise
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram


class Block(nn.Module):
    """``x + down(relu(up(x)))``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    """A linear, repeated blocks and a linear."""

    def __init__(self, layers: int = 2, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList([Block(width, hidden) for _ in range(layers)])
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


class ScaledBlock(Block):
    """A block that reads a table which all blocks share."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return super().forward(x * table)


class Cached(Stack):
    """A table for all blocks, and a second result from every block, as rotary tables and the KV cache of a decoder."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__(layers)
        self.layers = nn.ModuleList([ScaledBlock(8, 16) for _ in range(layers)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        table = x.sigmoid()
        x = self.first(x)
        kept = []
        for layer in self.layers:
            x = layer(x, table)
            kept.append(x.tanh())
        return self.last(x), *kept


class Wrapped(nn.Module):
    """Puts the same attribute in front of every path as tracing a pretrained model does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> object:
        return self.model(*inputs)


def stack(layers: int = 2, width: int = 8, hidden: int = 16) -> Stack:
    torch.manual_seed(20261122)
    return Stack(layers, width, hidden).eval().requires_grad_(False)


def export(model: nn.Module, *inputs: Tensor, canonical: bool = True) -> ExportedProgram:
    """Trace with a dynamic first axis, as the front end does."""
    batch = Dim("batch", min=1)
    shapes = (tuple({0: batch} for _ in inputs),)
    with torch.no_grad():
        program = torch.export.export(Wrapped(model).eval(), inputs, dynamic_shapes=shapes, strict=False)
    if canonical:
        canonicalise(program)
    return program


def weights(program: ExportedProgram) -> dict[str, Tensor]:
    return {**program.constants, **{key: value.detach() for key, value in program.state_dict.items()}}
