"""Tiny random models of every family, and the whole compiler on one of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as t
from sparsify_export import compile as compiler
from sparsify_export.calibrate.patterns import NM, Pattern
from sparsify_export.objective import output_of
from sparsify_export.passes.dialect.packed import Packed
from sparsify_export.passes.dialect.storage import FP32, Storage
from sparsify_export.passes.frontend.batches import Batch, token_batches
from sparsify_export.passes.frontend.load import describe
from sparsify_export.passes.frontend.trace import Traced, trace
from sparsify_export.passes.fx.canonical import canonicalise
from sparsify_export.passes.fx.partition import Partition, partition
from sparsify_export.passes.fx.products import Turned
from sparsify_export.passes.fx.rewrite import Lowered, lower_linears, stored_weights
from sparsify_export.passes.lower import to_onnx
from sparsify_export.passes.recipe import Recipe
from sparsify_export.passes.sparsify import Sparsified, sparsify
from sparsify_export.runtime.inspection import sparse_weights
from sparsify_export.runtime.published import Published, ask, put_weights

VOCABULARY = 96
TWO_OF_FOUR = NM(2, 4)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**WIDE, **TEXT, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}


@dataclass(frozen=True)
class Family:
    """How to make a tiny model, and what must become of it.

    Attributes:
        make: builds the random model.
        pruned: linears pruned in both blocks together.
        folded: channel orders folded in both blocks together: one MLP and one per KV head each.
        dense: linears left dense, all outside the blocks.
        ops: sparse ops in the file, where linears that read the same input are one.
    """

    make: Callable[[], Any]
    pruned: int
    folded: int
    dense: int
    ops: int = 8  # two blocks: attention in, attention out, MLP in, MLP out


def gemma3() -> Any:
    layers = ["sliding_attention", "full_attention"]
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GROUPED, sliding_window=8, layer_types=layers))


def opt() -> Any:
    config = {"ffn_dim": 128, "word_embed_proj_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return t.OPTForCausalLM(t.OPTConfig(hidden_size=64, pad_token_id=0, **config, **TEXT))


def gpt2() -> Any:
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=128, **ids)
    )


def vit() -> Any:
    return t.ViTForImageClassification(t.ViTConfig(**WIDE, image_size=32, patch_size=8))


FAMILIES = {
    "llama": Family(lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)), 14, 6, 1),
    "qwen3": Family(lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED)), 14, 6, 1),
    "gemma3": Family(gemma3, 14, 6, 1),
    "phi3": Family(lambda: t.Phi3ForCausalLM(t.Phi3Config(**GROUPED)), 8, 6, 1),
    "opt": Family(opt, 12, 10, 1),
    "gpt2": Family(gpt2, 8, 10, 1),
    "bert": Family(lambda: t.BertForMaskedLM(t.BertConfig(**WIDE, **TEXT)), 12, 10, 2),
    "vit": Family(vit, 12, 10, 1),
}
UPDATED = ("qwen3", "phi3", "gpt2", "vit")
"""Families that the tests compile with the balanced recipe; the others keep their original weights."""
CAUSAL = [name for name in FAMILIES if name not in ("bert", "vit")]


@dataclass(frozen=True)
class Compiled:
    """A compiled tiny model, and the torch model with the same weights."""

    model: Any
    traced: Traced
    parts: Partition
    params: dict[str, torch.Tensor]
    source: dict[str, torch.Tensor]
    done: Sparsified
    lowered: list[Lowered]
    packed: dict[str, Packed]
    path: Path
    probe: Batch = field(repr=False)
    turned: dict[str, Turned]

    def published(self, params: dict[str, torch.Tensor]) -> list[Published]:
        """What the model itself returns for the probe, with these weights."""
        put_weights(self.model, params, self.turned)
        return [ask(self.model, self.traced, self.probe)]


def random_model(name: str) -> Any:
    """The family's model with seeded weights; biases and norms are made random too, or folding them would not show."""
    torch.manual_seed(20261121)
    model = FAMILIES[name].make().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@cache
def partitioned(name: str) -> Partition:
    """The blocks of a family's model, for who only reads them: tracing takes seconds."""
    traced = trace(describe(random_model(name)))
    canonicalise(traced.program)
    return partition(traced.program)


def compile_family(
    name: str,
    folder: Path,
    *,
    pattern: Pattern | None = TWO_OF_FOUR,
    storage: Storage = FP32,
    **recipe: Any,
) -> Compiled:
    """Run every stage on a tiny model; the same calls as ``compile_model`` makes."""
    pretrained = describe(random_model(name))
    traced = trace(pretrained)
    turned = canonicalise(traced.program)
    parts = partition(traced.program)
    generator = torch.Generator().manual_seed(1)
    if pretrained.inputs[0] == "input_ids":
        ids = torch.randint(0, VOCABULARY, (9, 40), generator=generator)
        *batches, probe = token_batches(traced, ids, names=pretrained.inputs, tokens_per_batch=40)
    else:
        *batches, probe = [Batch((torch.randn(2, 3, 32, 32, generator=generator),), None) for _ in range(5)]
    # Copies: the model gets the pruned weights further down, and shares its own with the program.
    source = {**traced.program.constants, **{k: v.detach().clone() for k, v in traced.program.state_dict.items()}}
    params = dict(source)
    done = Sparsified((), (), {}, {})
    if pattern is not None:
        cache = compiler.cache_pairs(traced, parts)
        if name in UPDATED:
            recipe = {"update": "alps", "mask_from": "update", **recipe}
        output = output_of(traced, pretrained)
        done = sparsify(parts, params, Recipe(pattern, **recipe), batches, output=output, cache=cache)
        compiler.store(traced, params)
    put_weights(pretrained.model, params, turned)
    lowered = lower_linears(traced.program, storage=storage, on_grid=done.on_grid, patterns=done.patterns)
    packed = stored_weights(traced.program, lowered)
    path = folder / f"{name}.onnx"
    to_onnx(traced, path, metadata={"source": name})
    return Compiled(pretrained.model, traced, parts, params, source, done, lowered, packed, path, probe, turned)


def stored_linears(path: Path, rows: Callable[[str], int]) -> dict[str, torch.Tensor]:
    """The dense form of every sparse weight of a file by module path; linears that are one op there are taken apart.

    Args:
        path: the file.
        rows: module path of a linear to its out_features.
    """
    found: dict[str, torch.Tensor] = {}
    for info, weight in sparse_weights(path):
        module, _, names = info.path.rpartition(".")
        paths = [f"{module}.{name}" for name in names.split("+")]
        found.update(zip(paths, weight.split([rows(linear) for linear in paths]), strict=True))
    return found
