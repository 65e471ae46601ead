"""Write a model with experts of random weights in bfloat16, shard by shard, with a tokenizer: to measure decoding.

python tools/random_experts.py mixtral FOLDER
"""

import json
import math
import sys
from pathlib import Path

import torch
from random_llama import VOCABULARY, tokenizer
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "dtype": "bfloat16",
}


def shapes() -> dict[str, PretrainedConfig]:
    """Configurations by name, each of about 400 million parameters in proportions of the published model."""
    return {
        "mixtral": MixtralConfig(
            intermediate_size=3584, num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2, **COMMON
        ),
        "qwen3-moe": Qwen3MoeConfig(
            intermediate_size=3072,
            moe_intermediate_size=384,
            num_hidden_layers=5,
            num_experts=64,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            **COMMON,
        ),
        "gpt-oss": GptOssConfig(
            intermediate_size=1024, num_hidden_layers=4, num_local_experts=32, num_experts_per_tok=4, **COMMON
        ),
    }


def random(size: torch.Size, generator: torch.Generator) -> Tensor:
    """Normal numbers of variance 1 over the last length, or ones for a vector: outputs keep the size of inputs."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.randn(size, generator=generator).div_(math.sqrt(size[-1])).bfloat16()


def write(config: PretrainedConfig, folder: Path) -> int:
    """Write the model into ``folder``, which is made, a shard a parameter; returns how many numbers there are."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    count = 0
    for index, (name, parameter) in enumerate(model.named_parameters()):
        file = f"model-{index:05}.safetensors"
        save_file({name: random(parameter.shape, generator)}, folder / file, {"format": "pt"})
        files[name] = file
        count += parameter.numel()
    listed = {"metadata": {"total_size": 2 * count}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed), encoding="utf-8")
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return count


def main() -> int:
    """Write the model that is named."""
    configs = shapes()
    if len(sys.argv) != 3 or sys.argv[1] not in configs:
        sys.stderr.write(f"want one of {', '.join(configs)}, and a folder to make\n")
        return 2
    count = write(configs[sys.argv[1]], Path(sys.argv[2]))
    sys.stdout.write(f"{count:,} parameters\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
