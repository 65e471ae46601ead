"""A fused linear is pruned as the linears that it was made of, and a weight with several readers for all of them."""

import pytest
import torch
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.canonical import parameter_names
from sparsify_export.passes.fx.linears import find_linears
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.parts import ONE, Parts
from sparsify_export.passes.pipeline import prune
from sparsify_export.passes.recipe import Recipe
from torch import nn
from toys import export, stack, weights

WIDTH, SIZES = 24, (24, 16, 16)
CUTS = ("split", "chunk", "slice", "view and split", "across")


class Apart(nn.Module):
    """Three linears of one input, of very different sizes of weights."""

    def __init__(self, weights):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(WIDTH, len(w), bias=False) for w in weights])
        for linear, weight in zip(self.parts, weights, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        q, k, v = (linear(x) for linear in self.parts)
        return x + q + (k * v).sum(-1, keepdim=True)


class Fused(nn.Module):
    """The same as one linear whose outputs are taken apart."""

    def __init__(self, weights, cut):
        super().__init__()
        self.all, self.cut = nn.Linear(WIDTH, sum(SIZES), bias=False), cut
        self.all.weight = nn.Parameter(torch.cat(weights), requires_grad=False)

    def forward(self, x):
        y = self.all(x)
        if self.cut == "slice":
            q, k, v = y[..., :24], y[..., 24:40], y[..., 40:]
        elif self.cut == "chunk":
            q, rest = y[..., :24], y[..., 24:]
            k, v = rest.chunk(2, dim=-1)
        else:
            q, k, v = (y.view(y.shape) if self.cut == "view and split" else y).split(SIZES, dim=-1)
        if self.cut == "across":
            q = q + y[..., 1:25]
        return x + q + (k * v).sum(-1, keepdim=True)


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    scales = (1.0, 0.1, 5.0)
    return [s * torch.randn(n, WIDTH, generator=generator) for s, n in zip(scales, SIZES, strict=True)]


def model(make):
    made = stack(width=WIDTH)
    for i in range(2):
        made.layers[i] = make(drawn(i))
    return made


def pruned(net, pattern, **recipe):
    program = export(net, torch.randn(3, 40, WIDTH))
    generator = torch.Generator().manual_seed(3)
    batches = [Batch((torch.randn(4, 40, WIDTH, generator=generator),), None) for _ in range(2)]
    params = weights(program)
    prune(partition(program), params, Recipe(pattern, permute="none", **recipe), batches)
    return params, program


@pytest.mark.parametrize("cut", ["split", "slice", "view and split"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("update", ["none", "alps"])
def test_a_fused_linear_is_pruned_as_its_parts_are(cut, pattern, update):
    recipe = {"update": update, "mask_from": "update" if update == "alps" else "score"}
    apart, _ = pruned(model(Apart), pattern, **recipe)
    fused, _ = pruned(model(lambda w: Fused(w, cut)), pattern, **recipe)
    for part, weight in enumerate(torch.split(fused["model.layers.0.all.weight"], SIZES)):
        wanted = apart[f"model.layers.0.parts.{part}.weight"]
        assert torch.equal(weight == 0, wanted == 0)
        torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("cut", "parts"), list(zip(CUTS, [SIZES, (24, 32), SIZES, SIZES, ()], strict=True)), ids=CUTS)
def test_ranges_are_what_the_graph_takes_apart(cut, parts):
    program = export(model(lambda w: Fused(w, cut)), torch.randn(3, 5, WIDTH))
    linears = find_linears(program.graph_module.graph, parameter_names(program))
    assert {linear.parts for linear in linears if linear.path.endswith("all")} == {Parts(parts)}


HEADS, HEAD = 4, 6
LAYOUTS = {
    "BLOOM": Parts((HEAD, HEAD, HEAD), HEADS),
    "GPT-NeoX": Parts((HEAD, HEAD, HEAD), HEADS),
    "ViT": Parts((WIDTH, WIDTH, WIDTH)),
    "Falcon": Parts((2 * HEAD, HEAD, HEAD), HEADS),
    "multi-query": Parts((HEADS * HEAD, HEAD, HEAD)),
    "one query": ONE,
}


class Heads(nn.Module):
    """One linear for q, k and v, which are taken apart behind a reshape into heads, as published models do it."""

    def __init__(self, layout, parts):
        super().__init__()
        self.all, self.layout = nn.Linear(WIDTH, sum(parts.sizes or (WIDTH,)) * parts.repeats, bias=False), layout

    def forward(self, x):
        y, before = self.all(x), x.shape[:-1]
        if self.layout == "BLOOM":
            y = y.view(*before, HEADS, 3, HEAD)
            q, k, v = y[..., 0, :], y[..., 1, :], y[..., 2, :]
        elif self.layout == "GPT-NeoX":
            q, k, v = y.view(*before, HEADS, 3 * HEAD).transpose(1, 2).chunk(3, dim=-1)
            q, rest = q[..., :2], q[..., 2:]  # for rotary positions
            q = torch.cat([q, rest], dim=-1)
        elif self.layout == "ViT":
            q, k, v = y.reshape(*before, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.layout == "Falcon":
            y = y.view(*before, HEADS, 4, HEAD)
            q, k, v = y[..., :-2, :].sum(-2), y[..., [-2], :].sum(-2), y[..., [-1], :].sum(-2)
        elif self.layout == "multi-query":
            y = y.view(*before, HEADS + 2, HEAD)
            q, k, v = y[..., :-2, :], y[..., -2:-1, :], y[..., -1:, :]
        else:
            y = y.view(*before, HEADS, HEAD)
            q, k, v = y[..., :2], y[..., 2:], 1.0
        return x + (q.sum() + (k * v).sum())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_that_q_k_and_v_lie_in_by_turns_are_told_apart(layout):
    net = stack(width=WIDTH)
    for i in range(2):
        net.layers[i] = Heads(layout, LAYOUTS[layout]).requires_grad_(False)
    program = export(net, torch.randn(3, 5, WIDTH))
    linears = find_linears(program.graph_module.graph, parameter_names(program))
    assert {linear.parts for linear in linears if linear.path.endswith("all")} == {LAYOUTS[layout]}


@pytest.mark.parametrize("layout", ["BLOOM", "GPT-NeoX", "ViT"])
@pytest.mark.parametrize("update", ["none", "alps"])
def test_interleaved_heads_are_pruned_as_the_linears_apart(layout, update):
    recipe = {"update": update, "mask_from": "update" if update == "alps" else "score"}
    separate = [s * w for s, w in zip((1.0, 0.1, 5.0), torch.randn(3, WIDTH, WIDTH), strict=True)]
    nets = [stack(width=WIDTH) for _ in range(2)]
    for i in range(2):
        nets[0].layers[i] = Apart(separate)
        nets[1].layers[i] = fused = Heads(layout, LAYOUTS[layout]).requires_grad_(False)
        stacked = torch.stack(separate)  # [3, heads x head, in]
        if layout != "ViT":
            stacked = stacked.unflatten(1, (HEADS, HEAD)).transpose(0, 1)
        fused.all.weight.copy_(stacked.reshape(3 * WIDTH, WIDTH))
    apart, fused = (pruned(net, NM(2, 4), **recipe)[0] for net in nets)
    found = fused["model.layers.0.all.weight"]
    if layout != "ViT":
        found = found.unflatten(0, (HEADS, 3, HEAD)).transpose(0, 1)
    for part, weight in enumerate(found.reshape(3, WIDTH, WIDTH)):
        wanted = apart[f"model.layers.0.parts.{part}.weight"]
        assert torch.equal(weight == 0, wanted == 0)
        torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """One weight with two readers, of which the second one's inputs are a thousand times smaller."""

    def __init__(self, up):
        super().__init__()
        self.up = up

    def forward(self, x):
        return x + self.up(self.up(x).relu() * 0.001)


def test_a_shared_weight_is_scored_for_all_that_reads_it():
    """So the mask is that of the reader with the large inputs, though it is not the last one."""
    net = stack(width=WIDTH)
    for i in range(2):
        net.layers[i] = Twice(nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False))
    params, _ = pruned(net, NM(2, 4), score="wanda")
    generator = torch.Generator().manual_seed(3)
    x = torch.cat([net.first(torch.randn(4, 40, WIDTH, generator=generator)).flatten(0, 1) for _ in range(2)])
    groups = (net.layers[0].up.weight.abs() * x.norm(dim=0)).reshape(WIDTH, -1, 4)
    wanted = groups >= groups.topk(2, dim=-1).values[..., 1:]
    assert torch.equal((params["model.layers.0.up.weight"] != 0).reshape(WIDTH, -1, 4), wanted)
