"""Channel spaces of small graphs, most of them written to trip the search up.

Every space that is found is also folded in a random order, so a rule that allows too much fails here even
where no space was expected.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.fx.channels import find_channel_spaces
from sparsify_export.passes.fx.fold import apply_fold
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

IN, C = 6, 8


class Net(nn.Module):
    """Two linears into ``between``, one out of it."""

    def __init__(self, between, made=(C,), read=C, **extra):
        super().__init__()
        self.between = between
        self.up = nn.ModuleList(nn.Linear(IN, size) for size in made)
        self.down = nn.Linear(read, 5)
        for name, value in extra.items():
            setattr(self, name, nn.Parameter(value) if value.is_floating_point() else value)

    def forward(self, x):
        return self.down(self.between(self, *(up(x) for up in self.up)))


def found(net, shape=(2, 3, IN), dynamic=True):
    """The spaces as ``[(size, producers, consumers)]``, after checking that every one of them may be folded."""
    torch.manual_seed(0)
    net = net.eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(shape)
    sizes = ({0: Dim("batch", min=1), 1: Dim("tokens", min=1)},) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=sizes, strict=False)
        spaces = find_channel_spaces(program.graph_module, program.graph_signature.inputs_to_parameters)
        baseline = net(x)
        exact = net.double()(x.double())
        net.float()
        params = {name: p.detach() for name, p in net.named_parameters()}
        for seed, space in enumerate(spaces):
            order = torch.randperm(space.size, generator=torch.Generator().manual_seed(seed))
            apply_fold(space, order, params)
        close = compare(torch.func.functional_call(net, params, (x,)), baseline, exact, factor=8.0)
    assert close.ok, f"{[space.name for space in spaces]}: {close}"
    return [
        (s.size, [(r.param, r.start) for r in s.producers], [(r.param, r.start) for r in s.consumers]) for s in spaces
    ]


def rows(start=0, number=0):
    return [(f"up.{number}.weight", start), (f"up.{number}.bias", start)]


DOWN = "down.weight"
ONE = [(C, rows(), [(DOWN, 0)])]


@pytest.mark.parametrize("between", [
    lambda _, x: F.gelu(x),
    lambda _, x: F.dropout(x, 0.5, training=False).contiguous().to(torch.float64).to(x.dtype),
    lambda _, x: x * torch.sigmoid(x.mean(-1, keepdim=True)),
    lambda _, x: F.hardswish(x) / x.norm(dim=-1, keepdim=True).clamp(min=1e-3),
    lambda _, x: x - x.amax((1, 2), keepdim=True) + x.var(-1, keepdim=True),
    lambda _, x: x.softmax(-1),
    lambda _, x: F.rms_norm(x, (C,)),
    lambda _, x: torch.where(x > 0, x, -x).clamp(max=2.0),
    lambda _, x: x.transpose(0, 1).transpose(0, 1).unsqueeze(2).squeeze(2),
    lambda _, x: x.view(-1, C).relu().view(x.shape),
])  # fmt: skip
def test_symmetric_operations_leave_all_channels_free(between):
    assert found(Net(between)) == ONE


@pytest.mark.parametrize("between", [
    lambda _, x: x * torch.arange(1.0, C + 1),  # a constant with another entry for each channel
    lambda _, x: x + x.flip(-1),
    lambda _, x: x.cumsum(-1),  # no rule
    lambda _, x: x.roll(1, -1),
    lambda _, x: torch.cat([x[..., C // 2 :], -x[..., : C // 2]], -1) * torch.arange(C).cos() + x,  # rotary
    lambda _, x: x.sort(-1).values,
    lambda _, x: x.clone().mul_(torch.arange(1.0, C + 1)),  # in place
    lambda _, x: x[..., [3, 1, 2, 0, 7, 6, 5, 4]],
])  # fmt: skip
def test_what_has_no_symmetry_or_no_rule_is_pinned(between):
    assert found(Net(between)) == []


def test_the_largest_entry_of_all_has_no_rule():
    assert found(Net(lambda _, x: x / x.max())) == []


def test_mixing_tokens_and_channels_pins():
    net = Net(lambda _, x: x + x.transpose(1, 2).reshape(x.shape))
    assert found(net, dynamic=False) == []


def test_an_unknown_operation_pins_both_its_operands_and_nothing_else():
    net = Net(lambda _, x, y, z: torch.cat([torch.cdist(x, y), F.silu(z)], -1), (C, C, 4), 3 + 4)
    assert found(net, (3, IN), dynamic=False) == [(4, rows(0, 2), [(DOWN, 3)])]


def test_halves_are_separate_spaces():
    def between(_, x):
        a, b = x.chunk(2, -1)
        return torch.cat([F.silu(a), b], -1)

    assert found(Net(between)) == [(4, rows(0), [(DOWN, 0)]), (4, rows(4), [(DOWN, 4)])]


def test_a_gate_moves_with_what_it_gates():
    def between(_, x):
        gate, up = x.split(C, -1)
        return F.silu(gate) * up

    assert found(Net(between, (2 * C,))) == [
        (C, [("up.0.weight", 0), ("up.0.weight", C), ("up.0.bias", 0), ("up.0.bias", C)], [(DOWN, 0)])
    ]


def test_a_channel_read_twice_keeps_its_two_columns_apart():
    both = Net(lambda _, x: torch.cat([x, F.relu(x)], -1), read=2 * C)
    assert found(both) == [(C, rows(), [(DOWN, 0), (DOWN, C)])]


def test_interleaved_gate_is_not_a_range():
    assert found(Net(lambda _, x: x[..., ::2] * x[..., 1::2], (2 * C,))) == []


def test_mixing_copies_is_not_mistaken_for_symmetry():
    """Two channels, from two different tokens, that look alike in the graph: swapping them is wrong."""

    def between(_, x):
        shifted = torch.cat([x[:, 1:], x[:, :1]], 1)
        pairs = torch.stack([x, shifted], -1).flatten(-2)  # x0 s0 x1 s1 ...
        return pairs[..., 1:3]  # s0 x1

    assert found(Net(between, read=2), dynamic=False) == []


def test_reshape_into_heads_with_a_scale_per_head():
    def between(net, x):
        heads = x.unflatten(-1, (2, 4)) * net.scale[:, None]
        return heads.flatten(-2)

    assert found(Net(between, scale=torch.rand(2))) == [(4, rows(0), [(DOWN, 0)]), (4, rows(4), [(DOWN, 4)])]


def test_heads_that_share_a_gain_share_an_order():
    def between(net, x):
        heads = F.rms_norm(x.unflatten(-1, (2, 4)), (4,), net.gain)
        return heads.flatten(-2)

    shared = [("gain", 0), *[(name, start) for name in ("up.0.weight", "up.0.bias") for start in (0, 4)]]
    assert [(s, sorted(p), c) for s, p, c in found(Net(between, gain=torch.rand(4)))] == [
        (4, sorted(shared), [(DOWN, 0), (DOWN, 4)])
    ]


def test_a_residual_inside_ties_both_sides():
    def between(net, x):
        return x + F.linear(F.relu(F.linear(x, net.first)), net.second)

    net = Net(between, first=torch.rand(4, C), second=torch.rand(C, 4))
    sizes = {size: (sorted(p), c) for size, p, c in found(net)}
    assert sizes == {
        C: (sorted([*rows(), ("second", 0)]), [("first", 0), (DOWN, 0)]),
        4: ([("first", 0)], [("second", 0)]),
    }


def test_the_same_weight_twice():
    def between(net, x):
        return F.linear(F.relu(F.linear(x, net.square)), net.square)

    assert found(Net(between, square=torch.rand(C, C))) == [(C, [("square", 0), *rows()], [("square", 0), (DOWN, 0)])]


def test_static_tokens_do_not_hide_the_channels():
    assert found(Net(lambda _, x: F.gelu(x)), (3, IN), dynamic=False) == ONE
    flat = Net(lambda _, x: F.gelu(x).flatten(), read=3 * C)
    assert found(flat, (3, IN), dynamic=False) == [(C, rows(), [(DOWN, C * token) for token in range(3)])]


def test_multi_query_attention_with_matmul():
    def between(_, q, k, v):
        q = q.unflatten(-1, (2, 4)).transpose(1, 2)
        weights = (q @ k.unsqueeze(1).transpose(-1, -2)).softmax(-1)
        return (weights @ v.unsqueeze(1)).transpose(1, 2).flatten(-2)

    assert found(Net(between, (8, 4, 4), 8)) == [(4, rows(0, 2), [(DOWN, 0), (DOWN, 4)])]


def test_grouped_attention_inside_the_operation():
    def between(_, q, k, v):
        q, k, v = (x.unflatten(-1, (-1, 4)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True).transpose(1, 2).flatten(-2)

    assert found(Net(between, (16, 8, 8), 16)) == [
        (4, rows(0, 2), [(DOWN, 0), (DOWN, 4)]),
        (4, rows(4, 2), [(DOWN, 8), (DOWN, 12)]),
    ]


def test_a_graph_without_shapes_is_refused():
    graph_module = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"node input_1 has no meta\['val'\]"):
        find_channel_spaces(graph_module, {})


STEPS = {
    "relu": lambda x: F.relu(x),
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "gate": lambda x: x.chunk(2, -1)[0].sigmoid() * x.chunk(2, -1)[1],
    "swap": lambda x: torch.cat([x.chunk(2, -1)[1], x.chunk(2, -1)[0].tanh()], -1),
    "twice": lambda x: torch.cat([x, x.neg()], -1),
    "heads": lambda x: x.unflatten(-1, (2, -1)).softmax(-1).flatten(-2),
    "across": lambda x: x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2),
    "slice": lambda x: x[..., : x.shape[-1] // 2] * 2,
    "add": lambda x: x + x.mean(-1, keepdim=True),
    "fold": lambda x: x.unflatten(-1, (2, -1)).sum(-2),
    "repeat": lambda x: x.unflatten(-1, (2, 1, -1)).expand(*x.shape[:-1], 2, 2, -1).flatten(-3),
}


@settings(max_examples=12)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=5))
def test_any_chain_of_steps_folds_without_a_trace(names):
    def between(_, x):
        for name in names:
            if x.shape[-1] % 4 == 0:
                x = STEPS[name](x)
        return x

    read = between(None, torch.zeros(2, 3, 16)).shape[-1]
    found(Net(between, (16,), read))
