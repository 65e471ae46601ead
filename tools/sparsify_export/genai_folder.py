"""What onnxruntime-genai wants beside a decoder in a folder: our op library and ``genai_config.json``."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import onnx

from .passes.frontend.load import Pretrained
from .passes.frontend.positions import longest
from .passes.onnx.cache_in_place import is_in_place
from .runtime import library_path

CONFIG = "genai_config.json"
UNBOUNDED = 1 << 17
"""Tokens of a text at most where neither configuration nor tables set a limit; genai wants one."""
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def write_genai(pretrained: Pretrained, model: Path) -> str:
    """Put our library and ``genai_config.json`` beside a model, which genai then runs with its own loop.

    The cache is handed on as our graph returns it, longer by what was read, or stays where it is if the file keeps it
    in place (``past_present_share_buffer``); the type ``decoder`` is genai's for any decoder of token ids, an
    attention mask and such a cache.

    Args:
        pretrained: the model that was compiled.
        model: its ONNX file.

    Returns:
        Why genai cannot run it, in which case nothing is written; "" where it can.
    """
    proto = onnx.load(str(model), load_external_data=False)
    graph, in_place = proto.graph, is_in_place({entry.key: entry.value for entry in proto.metadata_props})
    shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in (*graph.input, *graph.output)}
    sizes = {name: shape for name, shape in shapes.items() if PAST.fullmatch(name)}
    if pretrained.kind != "causal":
        return "it runs decoders, and this is none"
    layers = len(sizes) // 2
    numbered = {f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")}
    if sizes.keys() != numbered:
        return "its caches are numbered from 0 without a gap, and those of this model are not"
    if len(set(sizes.values())) != 1:
        return "its caches have one shape in all layers, and those of this model differ"
    _, heads, _, head_size = next(iter(sizes.values()))
    told = _config(
        pretrained, model.name, layers=layers, heads=heads, head_size=head_size, vocabulary=shapes["logits"][-1]
    )
    told["search"]["past_present_share_buffer"] = in_place
    if not told["model"]["eos_token_id"]:
        return "it wants a token that ends a text, and this model names none"
    (model.parent / CONFIG).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(library_path(), model.parent / library_path().name)
    return ""


def _config(
    pretrained: Pretrained, filename: str, *, layers: int, heads: int, head_size: int, vocabulary: int
) -> dict[str, Any]:
    """What ``genai_config.json`` holds; its keys are genai's own."""
    config = pretrained.model.config.get_text_config()
    # Generation has the last word on what ends a text; configurations need not have these entries at all.
    tokens = [getattr(source, "eos_token_id", None) for source in (pretrained.model.generation_config, config)]
    said = next((token for token in tokens if token is not None), None)
    ends = [said] if isinstance(said, int) else list(said or ())
    pads = (*(getattr(source, "pad_token_id", None) for source in (pretrained.tokenizer, config)), *ends[:1])
    context = longest(pretrained.model) or UNBOUNDED
    first = getattr(config, "bos_token_id", None)
    begin = {} if first is None else {"bos_token_id": first}
    return {
        "model": {
            "type": "decoder",
            **begin,
            "eos_token_id": ends,
            "pad_token_id": next((pad for pad in pads if pad is not None), None),
            "context_length": context,
            "vocab_size": vocabulary,
            "decoder": {
                "filename": filename,
                "session_options": {"custom_ops_library": library_path().name, "provider_options": []},
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": layers,
                "num_key_value_heads": heads,
                "head_size": head_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": context},
    }
