"""What a checkpoint holds and the model does not use: refused where that makes it another model."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InputError


def check_unread(model: nn.Module, keys: Collection[str], source: str) -> list[str]:
    """Refuse tensors of the repeated layers, and of modules that the model has; name what else is left out.

    What transformers itself declares ignorable (old buffers, heads for another purpose) is not among ``keys``. Of the
    rest, a whole module outside the layers that the class does not have, as the pooler under a language model or the
    vision tower beside its text model, leaves what the class computes as it is. A bias of a linear that has none, a
    layer more than the configuration says, factors of an adapter or codes of a quantiser do not.

    Args:
        model: the loaded model.
        keys: names of the tensors that nothing took.
        source: what the user asked for.

    Returns:
        A note for each module that was left out.

    Raises:
        InputError: a tensor belongs to what the model computes.
    """
    modules = dict(model.named_modules())
    left = set()
    for key in sorted(keys):
        path = key.split(".")
        depth = max(i for i in range(len(path)) if ".".join(path[:i]) in modules)
        above = ".".join(path[:depth])
        if depth == len(path) - 1 or any(part.isdigit() for part in path[: depth + 1]):
            raise InputError(
                f"{source} holds {len(keys)} tensors that {type(model).__name__} does not take, e.g. {key}; "
                f"{_why(model, path, depth)}"
            )
        left.add(f"{above}.{path[depth]}".removeprefix("."))
    return [f"{name} of the checkpoint is left out: {type(model).__name__} has none" for name in sorted(left)]


def check_gguf(file: Path, model: Any) -> None:
    """Refuse a GGUF file with tensors or a scaling of positions that transformers' reader drops without a word.

    Raises:
        InputError: the file holds such a thing; it is named.
    """
    import gguf

    reader = gguf.GGUFReader(str(file))
    field = reader.get_field("general.architecture")
    kind = str(field.contents()) if field is not None else ""
    names = {gguf.MODEL_ARCH_NAMES[arch]: arch for arch in gguf.MODEL_ARCH_NAMES}
    held = {str(tensor.name) for tensor in reader.tensors}
    if kind in names:
        layers = model.config.get_text_config().num_hidden_layers
        table = gguf.get_tensor_name_map(names[kind], layers)
        if unread := sorted(held - _gguf_names(model, table)):
            raise InputError(
                f"{file} holds {len(unread)} tensors that {type(model).__name__} with {layers} layers does not take, "
                f"e.g. {unread[0]}; without them it would be another model"
            )
    scaling = {name: f.contents() for name, f in reader.fields.items() if f"{kind}.rope.scaling." in name}
    own = (getattr(model.config.get_text_config(), "rope_parameters", None) or {}).get("rope_type", "default")
    for name in (f"{kind}.rope.scaling.type", f"{kind}.rope.scaling.factor"):
        if scaling.get(name) not in (None, "none", 1.0, 0.0) and own == "default":
            raise InputError(
                f"{file} says {name} = {scaling[name]}, which transformers drops when it reads GGUF; "
                "take the Hugging Face folder of this model"
            )


def _gguf_names(model: nn.Module, table: Any) -> set[str]:
    """What GGUF calls the tensors of a model; a file may have been made from it or from what is under it."""
    found = set()
    for key in model.state_dict():
        for name in (key, key.partition(".")[2]):
            module, dot, kind = name.rpartition(".")
            if kind not in ("weight", "bias"):
                module, dot, kind = name, "", ""
            known = table.get_name(module) if module else None
            if known is not None:
                found.add(f"{known}{dot}{kind}")
    return found


def _why(model: nn.Module, path: list[str], depth: int) -> str:
    """What such a tensor most likely means."""
    if any("lora" in part for part in path):
        return "they are an adapter's: merge it into the model first (peft: merge_and_unload, save_pretrained)"
    if path[-1] in ("SCB", "weight_scale", "scales", "qweight", "qzeros", "absmax", "quant_map", "weight_scale_inv"):
        return "its weights are codes of a quantiser; want float weights"
    if path[depth].isdigit():
        return "the configuration says fewer layers than the checkpoint holds"
    return "without them it would be another model"
