"""Forms in which a model cannot be read, told by its files and its configuration, and what to do about each."""

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from ..errors import InputError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def check_files(source: str, folder: Path) -> None:
    """Refuse a folder whose files are no whole model in safetensors.

    Raises:
        InputError: it is or holds an adapter, has no configuration, or all its weights are pickled.
    """
    names = {file.name for file in folder.iterdir()}
    if "adapter_config.json" in names:
        beside = "config.json" in names
        what = "holds an adapter beside the model, which would be ignored" if beside else "is an adapter"
        raise InputError(
            f"{source} {what}: merge it into its model first (peft: merge_and_unload, then save_pretrained)"
        )
    if "config.json" not in names:
        raise InputError(f"{source} is not a model: the folder has no config.json")
    if "model.onnx" in names and not any(name.endswith(".safetensors") for name in names):
        raise InputError(f"{source} holds an ONNX model and no other weights; give {folder / 'model.onnx'}")
    pickled = sorted(name for name in names if name.endswith(PICKLES))
    if pickled and not any(".safetensors" in name for name in names):
        raise InputError(
            f"cannot load {source}: its weights are pickled ({pickled[0]}), which can run code and is never read; "
            "load them with transformers where you trust them, and save_pretrained writes model.safetensors"
        )


def check_quantiser(source: str, config: Any) -> None:
    """Refuse the codes of another quantiser, which are no weights that could be pruned.

    Raises:
        InputError: the configuration names one; GGUF files, whose reader makes floats of them, do not.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return
    method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    raise InputError(
        f"{source} holds weights that are quantised already ({getattr(method, 'value', method)}); "
        "want the float weights it was made from"
    )


def custom_code(where: str, error: Exception, *, trusted: bool) -> str:
    """Why a model whose class comes with it was not loaded; "" where that is not the reason."""
    if trusted or not (_is_own(Path(where) / "config.json") or "trust_remote_code" in str(error)):
        return ""
    return "it needs Python code that comes with it; where you trust that, give --trust-remote-code"


def _is_own(file: Path) -> bool:
    """Whether a configuration names code of its own for a kind of model that transformers does not know."""
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):  # which is why it was not loaded, and was said
        return False
    return isinstance(config, dict) and "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING
