"""Write a Llama of random weights in bfloat16, shard by shard, with a tokenizer: for measurements of time and memory.

python tools/random_llama.py 0.3B FOLDER
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama: width, width of the MLP, layers, heads and heads of keys and values."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    "0.1B": Shape(hidden=640, inner=1792, layers=20, heads=10, kv_heads=5),
    "0.3B": Shape(hidden=1024, inner=2816, layers=28, heads=16, kv_heads=8),
    "1B": Shape(hidden=2048, inner=5632, layers=21, heads=16, kv_heads=8),
    "3B": Shape(hidden=3072, inner=8192, layers=29, heads=24, kv_heads=8),
}
"""By about how many parameters there are; embedding and head are tied."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; the other rows of the embedding are of no text."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate(["<s>", "</s>", *symbols])}
    made = Tokenizer(models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def weights_of(name: str, shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors of one layer, by what follows ``model.layers.N.``; outputs keep the size of inputs."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    sizes = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.inner, shape.hidden),
        "mlp.up_proj": (shape.inner, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.inner),
    }
    made = {f"{name}.{key}.weight": random(size, generator) for key, size in sizes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return made | {f"{name}.{key}.weight": torch.ones(shape.hidden, dtype=torch.bfloat16) for key in norms}


def random(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Normal numbers ``[out, in]`` bfloat16 of variance ``1 / in``."""
    return (torch.randn(size, generator=generator) / math.sqrt(size[1])).bfloat16()


def write(shape: Shape, folder: Path) -> int:
    """Write the model into ``folder``, which is made, a shard a layer; returns how many parameters there are."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    count = 0
    for index in range(-1, shape.layers):
        if index < 0:
            tensors = {
                "model.embed_tokens.weight": random((VOCABULARY, shape.hidden), generator),
                "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
            }
        else:
            tensors = weights_of(f"model.layers.{index}", shape, generator)
        name = f"model-{index + 2:05}-of-{shape.layers + 1:05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        files |= dict.fromkeys(tensors, name)
        count += sum(tensor.numel() for tensor in tensors.values())
    listed = {"metadata": {"total_size": 2 * count}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed), encoding="utf-8")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return count


def main() -> int:
    """Write the size that is named."""
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.stderr.write(f"want one of {', '.join(SHAPES)}, and a folder to make\n")
        return 2
    count = write(SHAPES[sys.argv[1]], Path(sys.argv[2]))
    sys.stdout.write(f"{count:,} parameters\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
