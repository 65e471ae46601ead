"""Tiny configurations of any architecture: the defaults of its class, made smaller by the names of their sizes."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 96
TOKENS = 16
LAYERS = 2
WORDS = [f"w{i}" for i in range(VOCABULARY - 4)]

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "projection_dim", "lru_width", "output_dim", "attention_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("d_inner", "dim_ff", "hidden_dim", "ffn_hidden_size", "vocab_embed_dim", "conv_bias_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers", "layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads", "num_attn_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_group", "topk_group", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "v_head_dim", "d_head", "attention_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 32),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "entity_vocab_size"), VOCABULARY),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_chunk_size"), 16),
    "linear_num_key_heads": 4,
    "mamba_d_ssm": 128,
    "image_size": 32,
    "patch_size": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "text_config_dict": None,
    "vision_config_dict": None,
}
"""The size of everything that a configuration calls so; most architectures need nothing more."""


def tiny_config(kind: str, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration of ``kind`` (its ``model_type``) with a few thousand weights a layer.

    Args:
        kind: a key of transformers' own mapping.
        changes: what the names of the sizes do not say; of a configuration inside, by a dictionary.
    """
    return CONFIG_MAPPING[kind](**_small(CONFIG_MAPPING[kind]().to_dict(), changes))


def _small(default: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    layers = next(
        (default[n] for n in SIZES if SIZES[n] == LAYERS and isinstance(default.get(n), int) and "layer" in n), None
    )
    for name, value in default.items():
        if isinstance(value, Mapping) and "model_type" in value:
            own = changes.get(name, {})
            made[name] = None if own is None else _small(value, own)
        elif name in changes:
            continue
        elif name in SIZES and value is not None and not isinstance(value, list | tuple | bool):
            made[name] = SIZES[name] if not isinstance(SIZES[name], int) else _kept(name, value)
        elif isinstance(value, list) and layers and len(value) == layers and name.endswith(("types", "type")):
            made[name] = _varied(value)
        elif name in ("model_type", "rope_parameters"):
            made[name] = value
    return {
        **made,
        **{n: v for n, v in changes.items() if not isinstance(made.get(n), dict) or not isinstance(v, Mapping)},
    }


def _kept(name: str, value: Any) -> Any:
    """A size, but one where there was one: as many heads for keys as that, one layer where there is no more."""
    return min(SIZES[name], value) if isinstance(value, int) and value > 0 and "token_id" not in name else SIZES[name]


def _varied(kinds: list[Any]) -> list[Any]:
    """The first of each kind of layer, as many as a tiny model has."""
    return (list(dict.fromkeys(kinds)) + kinds)[:LAYERS]


def tiny_model(kind: str, name: str, changes: Mapping[str, Any]) -> Any:
    """A random model of class ``name``, its weights spread enough that what is left out shows."""
    torch.manual_seed(20261127)
    config = tiny_config(kind, changes)
    model = getattr(transformers, name)(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save_text(folder: Path) -> Path:
    """A text of the words that every tiny tokenizer has."""
    path = folder / "text.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 600)))
    return path


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of as many words as the tiny models have."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def save_inputs(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Batches of random inputs, each of two samples: tokens without padding for what is called as text is."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(3):
        arrays = {name: generator.standard_normal((2, *shape), dtype=np.float32) for name, shape in shapes.items()}
        for name in arrays.keys() & {"input_ids", "attention_mask", "token_type_ids"}:
            words = generator.integers(4, VOCABULARY, arrays[name].shape)
            arrays[name] = {"input_ids": words, "attention_mask": np.ones_like(words)}.get(name, np.zeros_like(words))
        np.savez(folder / f"{i}.npz", **arrays)
    return folder


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """A sample of every input of a model that does not take text alone, as its forward and configuration say."""
    taken = inspect.signature(model.forward).parameters
    text = {name: (TOKENS,) for name in ("input_ids", "attention_mask", "token_type_ids") if name in taken}
    other = next(name for name in ("pixel_values", "input_features", "input_values") if name in taken)
    return {**(text if "input_ids" in taken else {}), other: _sample(other, model.config)}


def _sample(name: str, config: Any) -> tuple[int, ...]:
    if name == "pixel_values":
        config = getattr(config, "vision_config", config)
        size = getattr(config, "image_size", 32)
        side = size if isinstance(size, int) else size[0]
        return getattr(config, "num_channels", 3), side, side
    bands = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", None)
    if name == "input_values" and bands is None:
        return (3200,)
    return getattr(config, "max_length", 200), bands or 80
