"""Load a pretrained transformer from a Hugging Face folder, a hub id or a GGUF file."""

import contextlib
import inspect
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..errors import InputError
from ..files import LARGEST_JSON, check_regular, read_json
from ..mapped import mapped, parameters_mapped
from .forms import check_files, check_quantiser, custom_code
from .kv_cache import cache_shapes, looks_ahead
from .unread import check_gguf, check_unread

TENSOR_COUNT_AT = 8  # bytes into a GGUF file: behind magic and version, 8 bytes, little endian
NUMBERS = 1 << 24
"""Of a weight that are looked at at a time."""
ASYNC = "HF_DEACTIVATE_ASYNC_LOAD"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHARDS = "model.safetensors.index.json"
MOST = {re.compile(r"labels$"): 1_000_000, re.compile(r"(layers?|blocks?|depths?|experts)$"): 10_000}
"""The largest numbers in a configuration that say how many of something are built, by how their names end."""
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OTHER_INPUTS = ("pixel_values", "input_features", "input_values")
"""Pictures, spectra and waves, as the arguments of transformers' models are called."""


@dataclass(frozen=True)
class Pretrained:
    """A model as it was published, in float32 and eval mode; what was loaded lies in mapped files.

    Attributes:
        model: the module.
        tokenizer: its tokenizer, or None where there is none (vision models, bare checkpoints).
        kind: ``causal`` decodes with a KV cache; ``encoder`` maps one set of inputs to outputs.
        inputs: names of the arguments that the exported graph takes, without the cache, text first.
        source: what the user asked for.
        notes: what the user should know about how it was loaded.
        cache: ``(kv_heads, head_dim of keys, head_dim of values)`` of each cache layer of a decoder.
    """

    model: PreTrainedModel
    tokenizer: Any
    kind: Literal["causal", "encoder"]
    inputs: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()
    cache: tuple[tuple[int, int, int], ...] = ()

    @property
    def takes_text_alone(self) -> bool:
        """Whether text is all that the model takes."""
        return all(name in TEXT_INPUTS for name in self.inputs)


def load(source: str, *, trust_remote_code: bool = False) -> Pretrained:
    """Load ``source`` and find out how it is called.

    The class comes from the checkpoint's own ``architectures``; weights are read from safetensors or
    GGUF, never from pickle. Code that comes with a checkpoint runs only with ``trust_remote_code``.

    Raises:
        InputError: the path is missing, is not a model, is damaged, or is a kind we cannot compile.
    """
    transformers_logging.disable_default_handler()  # what it warns of is for whoever listens, not for the screen
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()
    where, options = _locate(source)
    options["trust_remote_code"] = trust_remote_code
    try:
        if "local_files_only" not in options and (index := _hub_index(source)):
            _check_shards(index)
        config = AutoConfig.from_pretrained(where, **options)
        if getattr(config, "transformers_weights", None) is not None:  # another way to name an index, or a pickle
            raise InputError(f"{source}: its configuration names the file of its weights; want model.safetensors")
        check_quantiser(source, config)
        _check_layers(source, config, options)
        auto = _model_class(config)
        use = {} if "gguf_file" in options else {"use_safetensors": True}
        # Handing the config over spares a GGUF file two more readings of its vocabulary. The reader of GGUF draws a
        # progress bar that cannot be turned off; ours is on the screen already.
        with contextlib.redirect_stderr(io.StringIO()), parameters_mapped(), _one_by_one(), _InFiles():
            known = {"config": config, "dtype": torch.float32, "output_loading_info": True, **use, **options}
            (model, info), notes = _with_attention(auto, where, known)
    except InputError:
        raise
    except Exception as error:  # transformers raises whatever its parsers raise: OSError, KeyError, SafetensorError ...
        why = custom_code(where, error, trusted=trust_remote_code) or _first_line(error)
        raise InputError(f"cannot load {source}: {why}") from error
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        raise InputError(f"{source} is damaged: it lacks {len(missing)} weights of the model, e.g. {missing[0]}")
    notes += check_unread(model, info["unexpected_keys"], source)
    if "gguf_file" in options:
        check_gguf(Path(where) / options["gguf_file"], model)
    try:
        tokenizer = _tokenizer(where, config=config, **options)
    except Exception:  # a model without a tokenizer is a model all the same; text commands say so when they need one
        tokenizer = None
    return describe(model, tokenizer, source, notes)


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model, without its weights.

    Raises:
        InputError: the model does not exist or has no tokenizer.
    """
    where, options = _locate(source)
    return _read_tokenizer(where, source, options)


def tokenizer_beside(folder: Path) -> Any:
    """The tokenizer in a folder, whatever else is in it; None where there is none.

    Raises:
        InputError: it cannot be read.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return None
    _check_folder(folder)
    return _read_tokenizer(str(folder), str(folder), {"local_files_only": True})


def _read_tokenizer(where: str, source: str, options: dict[str, Any]) -> Any:
    try:
        # Said outright: where nothing is said, transformers asks on the terminal whether to run a checkpoint's code.
        return _tokenizer(where, trust_remote_code=False, **options)
    except Exception as error:
        raise InputError(f"{source} has no tokenizer that can be read: {_first_line(error)}") from error


def _tokenizer(where: str, **options: Any) -> Any:
    """What ``AutoTokenizer`` finds; an empty one, which it makes up where there is no vocabulary, is none."""
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError("its vocabulary is empty")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(f"its model_max_length is {tokenizer.model_max_length!r}; want a number")
    return tokenizer


def describe(
    model: PreTrainedModel, tokenizer: Any = None, source: str = "model", notes: Sequence[str] = ()
) -> Pretrained:
    """Find out how a model in memory is called.

    Raises:
        InputError: a weight holds NaN or infinity, or it is an encoder-decoder, which would need several graphs.
    """
    model = model.eval().requires_grad_(False)
    model.config.return_dict = True  # what is returned is known by name
    for name, weight in model.named_parameters():
        if not all(bool(rows.isfinite().all()) for rows in torch.split(weight.flatten(), NUMBERS)):
            raise InputError(f"{source} is damaged: {name} holds NaN or infinity")
    parameters = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in parameters:
        raise InputError(f"{source} is an encoder-decoder model; only decoders and encoders can be compiled")
    if model.can_generate() and "input_ids" in parameters:
        notes = [*notes, *_left_out(model)]
        cache, why = _cache(model)
        if cache:
            text = ("input_ids", "attention_mask")
            return Pretrained(model, tokenizer, "causal", text, source, tuple(notes), cache)
        notes.append(f"{why}, so the file takes whole texts and cannot write one")
        inputs = tuple(name for name in TEXT_INPUTS if name in parameters)
        return Pretrained(model, tokenizer, "encoder", inputs, source, tuple(notes))
    takes_text = "input_ids" in parameters
    if model.main_input_name != "input_ids" and not takes_text:
        return Pretrained(model, tokenizer, "encoder", (model.main_input_name,), source, tuple(notes))
    inputs = tuple(name for name in (*TEXT_INPUTS, *OTHER_INPUTS) if name in parameters)
    return Pretrained(model, tokenizer, "encoder", inputs, source, tuple(notes))


def _cache(model: PreTrainedModel) -> tuple[tuple[tuple[int, int, int], ...], str]:
    """The shapes of a decoder's KV cache, or why it has none."""
    try:
        cache = cache_shapes(model)
        if cache and looks_ahead(model):
            return (), f"{type(model).__name__} looks ahead as it is configured"
        return cache, f"{type(model).__name__} keeps no KV cache as it is configured"
    except InputError as error:
        return (), str(error)


def _left_out(model: PreTrainedModel) -> list[str]:
    """What a decoder of several kinds of input loses: only its text goes into the graph."""
    text = model.config.get_text_config()
    if text is model.config:
        return []
    return [f"only the text model of {type(model).__name__} is compiled; images or sound cannot be given to the file"]


def _check_layers(source: str, config: Any, options: dict[str, Any]) -> None:
    """Refuse a GGUF file with fewer tensors than layers, before a model of that size is made.

    Raises:
        InputError: it has.
    """
    if "gguf_file" not in options:
        return
    with Path(source).open("rb") as file:
        file.seek(TENSOR_COUNT_AT)
        tensors = int.from_bytes(file.read(8), "little")
    layers = config.get_text_config().num_hidden_layers
    if layers > tensors:
        raise InputError(f"{source} is damaged: it names {layers} layers and holds {tensors} tensors")


def _locate(source: str) -> tuple[str, dict[str, Any]]:
    """The first argument and the options that ``from_pretrained`` wants for this source."""
    path = Path(source)
    if path.is_file():
        if path.suffix == ".gguf":
            with path.open("rb") as file:
                if (magic := file.read(4)) != b"GGUF":
                    raise InputError(f"{source} is not a GGUF file: it starts with {magic!r}, not b'GGUF'")
                file.seek(TENSOR_COUNT_AT)
                if not any(file.read(8)):  # transformers would make up a whole model of a size that it makes up too
                    raise InputError(f"{source} holds no tensors")
            return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
        if path.suffix == ".onnx":
            raise InputError(f"{source} is an ONNX model; this version compiles Hugging Face folders and .gguf files")
        raise InputError(f"{source} is not a model: want a Hugging Face folder or a .gguf file")
    if path.is_dir():
        check_files(source, path)
        _check_folder(path)
        return str(path), {"local_files_only": True}
    if HUB_ID.fullmatch(source) and not path.parent.is_dir():
        return source, {}
    raise InputError(f"{source} does not exist")


def _check_folder(folder: Path) -> None:
    """Refuse a folder whose files would hang or fill the memory of whoever reads them, or lead elsewhere.

    Raises:
        InputError: a pipe or device, a giant JSON file, a size in the configuration that no model has, an adapter
            (which names the model it belongs to, and that would be looked for), or weights listed outside the folder
            or in pickle files.
    """
    for file in folder.iterdir():
        if not file.is_dir():
            check_regular(file, most=LARGEST_JSON if file.suffix == ".json" else None)
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} holds an adapter; merge it into its model first")
    if (folder / "config.json").is_file():
        _check_sizes(read_json(folder / "config.json"), folder / "config.json")
    if (folder / SHARDS).is_file():
        _check_shards(folder / SHARDS)


def _check_sizes(config: Any, file: Path) -> None:
    """Layers and labels are made one by one, before a weight is looked at."""
    if not isinstance(config, dict):
        raise InputError(f"{file} is not a configuration: it holds a {type(config).__name__}")
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, file)
        most = next((most for ending, most in MOST.items() if ending.search(key)), None)
        if most is not None and isinstance(value, int) and value > most:
            raise InputError(f"{file}: {key} is {value}; want {most} at most")


def _hub_index(source: str) -> Path | None:
    """The list of shards of a model on the hub, fetched before anything else; None where it has one file."""
    try:
        return Path(hf_hub_download(source, SHARDS))
    except EntryNotFoundError:
        return None


def _check_shards(index: Path) -> None:
    """Weights come from safetensors files in the same folder only: transformers would unpickle others."""
    listed = read_json(index)
    names = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(names, dict):
        raise InputError(f"{index} is damaged: it lists no weights")
    for name in names.values():
        if not isinstance(name, str) or "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise InputError(f"{index} names {name!r}; want .safetensors files beside it")


def _with_attention(auto: Any, where: str, options: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Load with torch's own attention, which becomes one op of the file, or, where the class has none, written out."""
    try:
        return auto.from_pretrained(where, attn_implementation="sdpa", **options), []
    except ValueError:  # so says a class without it; what is wrong otherwise is wrong a second time
        made = auto.from_pretrained(where, attn_implementation="eager", **options)
    name = type(made[0]).__name__
    return made, [f"{name} has no form of attention that is one op, so its products and softmax are written out"]


class _InFiles(TorchFunctionMode):
    """Inside, every tensor that is cast goes into a mapped file.

    transformers casts what it makes of a GGUF file, and has all of it before the first tensor becomes a parameter.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.to or made.device.type != "cpu" or isinstance(made, torch.nn.Parameter):
            return made
        return mapped(made)


@contextlib.contextmanager
def _one_by_one() -> Iterator[None]:
    """Inside, transformers reads a weight when it is wanted; otherwise its threads read ahead as much as they can."""
    before = os.environ.get(ASYNC)
    os.environ[ASYNC] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ASYNC]
        else:
            os.environ[ASYNC] = before


def _model_class(config: Any) -> Any:
    """The class that the checkpoint names, or the causal language model of its configuration."""
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    return found or AutoModelForCausalLM


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
