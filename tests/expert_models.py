"""Tiny random models with experts, one of every way to write them down."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as t

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {**COMMON, "head_dim": 16}
FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY = {"num_experts": 8, "num_experts_per_tok": 2}
SHARED = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
LATENT = {
    **COMMON,
    **SHARED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**HEADS, **FEW, intermediate_size=96)),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(
            **HEADS, **MANY, intermediate_size=96, moe_intermediate_size=32, shared_expert_intermediate_size=64
        )
    ),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**HEADS, **MANY, intermediate_size=96, moe_intermediate_size=32, norm_topk_prob=True)
    ),
    "olmoe": lambda: t.OlmoeForCausalLM(t.OlmoeConfig(**COMMON, **MANY, intermediate_size=32)),
    "granitemoe": lambda: t.GraniteMoeForCausalLM(t.GraniteMoeConfig(**COMMON, **FEW, intermediate_size=32)),
    "phimoe": lambda: t.PhimoeForCausalLM(t.PhimoeConfig(**COMMON, **FEW, intermediate_size=96)),
    "deepseek_v2": lambda: t.DeepseekV2ForCausalLM(
        t.DeepseekV2Config(**LATENT, q_lora_rank=None, n_group=None, topk_group=None, topk_method="greedy")
    ),
    "llama4": lambda: t.Llama4ForCausalLM(
        t.Llama4TextConfig(
            **{**HEADS, **FEW, "num_experts_per_tok": 1},
            intermediate_size=32,
            intermediate_size_mlp=96,
            interleave_moe_layer_step=1,
        )
    ),
    "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(**LATENT, q_lora_rank=32, n_group=2, topk_group=1)
    ),
    "glm4_moe": lambda: t.Glm4MoeForCausalLM(t.Glm4MoeConfig(**HEADS, **SHARED, n_group=1, topk_group=1)),
    "dots1": lambda: t.Dots1ForCausalLM(t.Dots1Config(**HEADS, **SHARED, n_group=1, topk_group=1)),
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(
            **HEADS,
            **FEW,
            intermediate_size=32,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}


def random_experts(name: str) -> Any:
    """The model with seeded weights; biases and norms are random too, or what becomes of them would not show."""
    torch.manual_seed(20261127)
    model = MODELS[name]().eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1 or key.endswith("_bias"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
