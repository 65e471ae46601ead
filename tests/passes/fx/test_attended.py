"""Linears whose outputs attention averages: which they are, and what the attention makes of their inputs."""

import pytest
import torch
from families import FAMILIES, partitioned
from sparsify_export.calibrate.patterns import NM
from sparsify_export.calibrate.update import relative_error
from sparsify_export.passes.equivalence import compare_unproven
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.attended import averages, find_attended
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.pipeline import prune
from sparsify_export.passes.recipe import Recipe
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention
from toys import Stack, export, weights

TOKENS = 12
GENERATOR = torch.Generator().manual_seed(11)
X = torch.randn(2, TOKENS, 8, generator=GENERATOR)
FUSED = {"phi3", "gpt2"}  # one linear for queries, keys and values


@pytest.mark.parametrize("name", FAMILIES)
def test_the_values_of_every_family_are_found(name):
    for block in partitioned(name).blocks:
        paths = {linear.node: linear.path.rpartition(".")[2] for linear in block.linears}
        found = [paths[node] for node in find_attended(block)]
        assert found == [] if name in FUSED else found in (["v_proj"], ["value"])


class Attention(nn.Module):
    """Two heads; ``values`` says what is done to the values, and what else reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.heads(self.q(x)), self.heads(self.k(x)), self.values(x))

    def out(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).reshape(v.shape[0], -1, 8))

    def values(self, x: Tensor) -> Tensor:
        return self.heads(self.v(x))


class Permuted(Attention):
    def values(self, x: Tensor) -> Tensor:
        return self.v(x).unsqueeze(2).reshape(x.shape[0], x.shape[1], 2, 4).permute(0, 2, 1, 3).contiguous()


class Scaled(Attention):
    """Something that is no mere move: its outputs are not averages of the linear's."""

    def values(self, x: Tensor) -> Tensor:
        return self.heads(self.v(x).tanh())


class AlsoRead(Attention):
    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x)
        return self.out(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(v)) + v


class Windows(Attention):
    """Attention inside windows of four tokens: the axis of the tokens is torn."""

    def heads(self, x: Tensor) -> Tensor:
        return x.view(-1, 4, 2, 4).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = attention(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)))
        return x + self.o(mixed.transpose(1, 2).reshape(x.shape))


class AsKeys(Attention):
    """Keys and values are one."""

    def forward(self, x: Tensor) -> Tensor:
        v = self.heads(self.v(x))
        return x + self.out(self.heads(self.q(x)), v, v)


class AcrossChannels(Attention):
    """Attention between channels: what is averaged are not tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(f(x)).transpose(2, 3) for f in (self.q, self.k, self.v))
        return x + self.o(attention(q, k, v).transpose(2, 3).transpose(1, 2).reshape(x.shape))


def one_block(kind):
    torch.manual_seed(5)
    model = Stack(layers=1)
    model.layers = nn.ModuleList([kind()])
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("kind", "found"),
    [(Attention, 1), (Permuted, 1), (Scaled, 0), (AlsoRead, 0), (Windows, 0), (AsKeys, 0), (AcrossChannels, 0)],
)
def test_only_what_attention_and_nothing_else_reads_as_values(kind, found):
    (block,) = partition(export(one_block(kind), X)).blocks
    attended = find_attended(block)
    assert len(attended) == found
    assert all(linear.path.endswith(".v") for linear in block.linears if linear.node in attended)


def call(*, heads=4, kv_heads=4, masked=None, **options):
    q = torch.randn(2, heads, TOKENS, 4, generator=GENERATOR)
    k = torch.randn(2, kv_heads, TOKENS, 4, generator=GENERATOR)
    mask = None
    if masked == "bool":
        mask = torch.rand(2, 1, TOKENS, TOKENS, generator=GENERATOR) < 0.5
        mask |= torch.eye(TOKENS, dtype=torch.bool)
    elif masked == "float":
        mask = torch.randn(TOKENS, TOKENS, generator=GENERATOR)
    return (q, k, torch.empty(2, kv_heads, TOKENS, 3), mask), options


CALLS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bool mask": {"masked": "bool"},
    "float mask": {"masked": "float"},
    "shared keys": {"kv_heads": 2, "enable_gqa": True},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_averages_are_what_attention_makes_of_the_inputs(options):
    args, kwargs = call(**options)
    eye = torch.eye(TOKENS).expand(2, args[1].shape[1], -1, -1)
    weights = attention(args[0], args[1], eye, args[3], **kwargs)  # [batch, heads, tokens, tokens]
    chosen = [3, 7, 11]  # every fourth of 12, the last among them
    wanted = (weights @ X[:, None])[:, :, chosen].reshape(-1, 8)
    assert torch.allclose(averages(args, kwargs, X, None), wanted, atol=1e-6)


def test_queries_that_do_not_count_leave_no_row():
    args, kwargs = call()
    queries = torch.ones(2, TOKENS, dtype=torch.bool)
    queries[0, :8] = queries[1, :] = False  # every fourth of the four that are left: the last
    rows = averages(args, kwargs, X, queries)
    whole = averages(args, kwargs, X, None)
    assert compare_unproven(rows, whole.reshape(2, 4, 3, 8)[0, :, 2:].reshape(-1, 8)).ok
    assert averages(args, kwargs, X, torch.zeros(2, TOKENS, dtype=torch.bool)).shape == (0, 8)


@pytest.mark.parametrize("before", [0, 1, 3], ids=["right", "both", "left"])
def test_padding_on_either_side_chooses_the_same_rows_as_none(before):
    q, k = torch.randn(2, 1, 4, 9, 4, generator=torch.Generator().manual_seed(12))
    alone = averages((q, k, k), {}, X[:1, :9], None)
    sides = (before, 3 - before)
    padded = [nn.functional.pad(x, (0, 0, *sides), value=7.0) for x in (q, k, X[:1, :9])]
    counts = nn.functional.pad(torch.ones(1, 9, dtype=torch.bool), sides)
    mask = counts[:, None, None].expand(1, 4, TOKENS, TOKENS)
    got = averages((padded[0], padded[1], padded[1], mask), {}, padded[2], counts)
    assert compare_unproven(got, alone).ok


def test_one_token_and_fewer_tokens_than_heads_still_leave_a_query():
    for tokens in (1, 3):
        q = torch.randn(1, 4, tokens, 4, generator=GENERATOR)
        assert averages((q, q, q), {}, X[:1, :tokens], None).shape == (4, 8)
    assert torch.equal(averages((q[:, :, :1],) * 3, {}, X[:1, :1], None), X[:1, 0].expand(4, 8))


def sinking(count=2):
    """Batches in which every query looks at the first token, which is like no other."""
    x = torch.randn(count, 3, TOKENS, 8, generator=GENERATOR)
    x[:, :, 0] = 4 * torch.randn(8, generator=GENERATOR)
    return [Batch((each,), None) for each in x]


def test_the_values_lose_less_of_what_attention_makes_of_them():
    model, batches = one_block(Attention), sinking()
    model.first.weight.copy_(torch.eye(8))
    model.layers[0].q.weight.mul_(3)
    program = export(model, X)
    block = partition(program).blocks[0]
    its = next(iter(find_attended(block).values()))
    key = "model.layers.0.v.weight"
    x = torch.cat([model.first(batch.inputs[0]) for batch in batches])
    q, k, v = (model.layers[0].heads(getattr(model.layers[0], name)(x)) for name in "qkv")
    seen = averages((q, k, v), {"is_causal": True}, x, None)
    errors = {}
    for hessian in ("inputs", "attended"):
        params = weights(program)
        dense = params[key]
        (report,) = prune(partition(program), params, Recipe(NM(2, 4), update="cg", hessian=hessian), batches)
        errors[hessian] = relative_error(params[key], dense, seen.mT @ seen)
        reported = next(linear for linear in report.linears if linear.path.endswith(".v"))
        if hessian == "attended":
            assert reported.error_after == pytest.approx(errors[hessian], rel=1e-3)
    assert its.node == next(linear.node for linear in block.linears if linear.path.endswith(".v"))
    assert errors["attended"] < 0.7 * errors["inputs"]
