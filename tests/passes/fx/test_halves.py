"""Halves: which linear is in which, on every family and by hand, and that together they are the block."""

import pytest
import torch
from families import FAMILIES, partitioned
from sparsify_export.passes.fx.halves import residual_adds, split_halves
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.run import run_part
from torch import Tensor, nn
from toys import Cached, Stack, export, stack, weights

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


class Linears(nn.Module):
    """Four linears of a block, to be wired up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.other = nn.LayerNorm(8), nn.RMSNorm(8)

    def attention(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class PreNorm(Linears):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return self.mlp(self.other(x)) + x


class PostNorm(Linears):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.attention(x) + x)
        return self.other(x + self.mlp(x))


class Parallel(Linears):
    """One norm for both, and one sum after the other."""

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        return (self.attention(seen) + self.mlp(seen)) + x


class Nested(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.attention(self.norm(x))) + self.mlp(self.other(x))


class NoChain(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(x))


class Gated(Linears):
    """Adds that are not of the residual stream: of a constant, and of two products."""

    def forward(self, x: Tensor) -> Tensor:
        z = x + (self.attention(self.norm(x)) + 1)
        up = self.up(self.other(z))
        return z + self.down(up * 2 + up.tanh())


class Three(Linears):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.second(self.norm(x))
        return x + self.mlp(x)


def one_block(kind):
    torch.manual_seed(3)
    model = stack(layers=1)
    model.layers = nn.ModuleList([kind()]).requires_grad_(False)
    return export(model, X)


BOTH, MLP = ["first", "second"], ["up", "down"]
KINDS = {
    PreNorm: [BOTH, MLP],
    PostNorm: [BOTH, MLP],
    Gated: [BOTH, MLP],
    Three: [["first"], ["second"], MLP],
    Parallel: [BOTH + MLP],
    Nested: [BOTH + MLP],
    NoChain: [BOTH + MLP],
}


def names_of(halves):
    return [[linear.path.rpartition(".")[2] for linear in half.linears] for half in halves]


def assert_together_equal(block, halves, parts, params, values):
    expected = run_part(block, values, params, parts.params)
    for half in halves:
        assert half.path == block.path
        values.update(run_part(half, values, params, parts.params))
    for name, value in expected.items():
        assert torch.equal(values[name], value) if isinstance(value, Tensor) else values[name] == value


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_by_hand(kind):
    program = one_block(kind)
    parts = partition(program)
    (block,) = parts.blocks
    halves = split_halves(block, parts.params)
    assert names_of(halves) == KINDS[kind]
    assert (halves == (block,)) == (len(KINDS[kind]) == 1)
    assert_together_equal(block, halves, parts, weights(program), {block.inputs[0]: X})


def test_the_cut_is_the_sum():
    program = one_block(PreNorm)
    parts = partition(program)
    (block,) = parts.blocks
    first, second = split_halves(block, parts.params)
    (cut,) = first.outputs
    assert cut.startswith("layers.0/")
    assert cut in second.inputs
    assert second.outputs == block.outputs
    params = {key.removeprefix("model.layers.0."): value for key, value in weights(program).items()}
    model = Linears().requires_grad_(False)
    model.load_state_dict({key: value for key, value in params.items() if key in model.state_dict()})
    values = run_part(first, {block.inputs[0]: X}, weights(program), parts.params)
    torch.testing.assert_close(values[cut], X + model.attention(model.norm(X)))


def test_a_second_result_of_a_block_and_a_shared_table():
    torch.manual_seed(0)
    program = export(Cached().eval().requires_grad_(False), X)
    parts = partition(program)
    for block in parts.blocks:
        assert split_halves(block, parts.params) == (block,)
        held = {node for node in block.module.graph.nodes if node.op == "placeholder" and node.name.startswith("p_")}
        assert len(residual_adds(block.module, held)) == 1


def test_blocks_of_different_width_have_no_chain():
    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) * x.sum(-1, keepdim=True)

    model = Stack(1)
    model.layers = nn.ModuleList([Widening()])
    parts = partition(export(model.eval().requires_grad_(False), X))
    assert split_halves(parts.blocks[0], parts.params) == parts.blocks


ATTENTION, INTERNAL = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
HALVES = {
    "llama": [ATTENTION, INTERNAL],
    "qwen3": [ATTENTION, INTERNAL],
    "gemma3": [ATTENTION, INTERNAL],
    "phi3": [["qkv_proj", "o_proj"], ["gate_up_proj", "down_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj", "out_proj"], ["fc1", "fc2"]],
    "gpt2": [["c_attn", "c_proj"], ["c_fc", "c_proj"]],
    "bert": [["query", "key", "value", "dense"], ["dense", "dense"]],
    "vit": [ATTENTION, ["fc1", "fc2"]],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_halves_of_every_family(name):
    parts = partitioned(name)
    for block in parts.blocks:
        assert sorted(map(sorted, names_of(split_halves(block, parts.params)))) == sorted(map(sorted, HALVES[name]))
