"""A tiny encoder with a padding mask, and the file that torch's own exporter writes of it, under the same names."""

import warnings

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

WIDTH, HEADS, HIDDEN, VOCABULARY = 16, 4, 32, 40


class Layer(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.shared = shared
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH // each) for each in (1, shared, shared, 1))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x, mask):
        b, s, _ = x.shape
        q = self.q(x).view(b, s, HEADS, WIDTH // HEADS).transpose(1, 2)
        k, v = (each(x).view(b, s, HEADS // self.shared, WIDTH // HEADS).transpose(1, 2) for each in (self.k, self.v))
        if self.shared > 1:
            k, v = (each[:, :, None].expand(-1, -1, self.shared, -1, -1).flatten(1, 2) for each in (k, v))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.first(x + self.o(attended.transpose(1, 2).reshape(b, s, WIDTH)))
        return self.second(x + self.down(torch.nn.functional.gelu(self.up(x))))


class Encoder(nn.Module):
    """Two layers behind an embedding; ``shared`` heads of the queries have one head of keys and values."""

    def __init__(self, shared):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Layer(shared), Layer(shared)])

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        mask = (1 - attention_mask[:, None, None, :].to(x.dtype)) * -1e4
        for layer in self.layers:
            x = layer(x, mask)
        return x


def encoder(shared=1):
    torch.manual_seed(0)
    return Encoder(shared).eval().requires_grad_(False)


def export(model, path, opset=17):
    """What ``torch.onnx.export`` writes, with every axis open."""
    ids = torch.zeros(2, 5, dtype=torch.int64)
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "sequence"} for name in [*names, "states"]}
    with warnings.catch_warnings(action="ignore"):  # it is called legacy, and what most files were written by
        torch.onnx.export(
            model, (ids, ids + 1), str(path), input_names=names, output_names=["states"], dynamic_axes=axes,
            opset_version=opset, dynamo=False,
        )  # fmt: skip
    return path


def feeds(count=2, rows=6, tokens=12, seed=0):
    """Texts of several lengths, padded behind."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        ids = rng.integers(0, VOCABULARY, (rows, tokens))
        mask = (np.arange(tokens) < rng.integers(tokens // 2, tokens + 1, (rows, 1))).astype(np.int64)
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def path_of(node):
    """``/layers.0/q/MatMul`` is ``layers.0.q``."""
    return node.removeprefix("/").removesuffix("/MatMul").removesuffix("/Gemm").replace("/", ".")


def inputs(model, batches):
    """What every linear reads of the tokens that count, float64 ``[tokens, in_features]``; by its name."""
    found = {name: [] for name in linears(model)}
    hooks = []
    for name, module in linears(model).items():
        hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0])))
    for feed in batches:
        mask = torch.from_numpy(feed["attention_mask"])
        model(torch.from_numpy(feed["input_ids"]), mask)
        for rows in found.values():
            rows[-1] = rows[-1][mask.bool()].double()
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def attended(model, name, batches):
    """What every head of an attention makes of the inputs of its value linear ``name``, for every fourth query."""
    layer = model.get_submodule(name.rsplit(".", 1)[0])
    rows = []
    states = []
    hook = layer.q.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    for feed in batches:
        mask = torch.from_numpy(feed["attention_mask"])
        model(torch.from_numpy(feed["input_ids"]), mask)
        x = states.pop()
        for b in range(len(x)):
            length = int(mask[b].sum())
            own = x[b, :length]
            q, k = (each(own).view(length, -1, WIDTH // HEADS) for each in (layer.q, layer.k))
            k = k.repeat_interleave(layer.shared, dim=1)
            for h in range(HEADS):
                for query in range(length):
                    if (length - 1 - query) % HEADS == 0:
                        scores = torch.stack([q[query, h] @ k[t, h] for t in range(length)]) / (WIDTH // HEADS) ** 0.5
                        rows.append(scores.softmax(0) @ own)
    hook.remove()
    return torch.stack(rows).double()
