"""Embeddings of texts: an encoder's last hidden states, pooled and normalised as its folder says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ..passes.errors import InputError
from ..passes.files import read_json

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Hidden: TypeAlias = Callable[[Arrays], NDArray[np.float32]]
"""Maps ``input_ids`` and the like, int64 ``[texts, tokens]``, to last hidden states ``[texts, tokens, size]``."""

Mode: TypeAlias = Literal["mean", "cls", "max", "lasttoken"]
FLAGS: Mapping[str, Mode] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
BATCH = 32


@dataclass(frozen=True)
class Pooling:
    """What follows an encoder to make one vector of a text, as sentence-transformers keeps it in a folder.

    Attributes:
        mode: mean or maximum over a text's tokens, the first of them, or the last.
        normalise: divide by the Euclidean norm.
        length: tokens of a text at most; the rest of a longer one is cut off. None: what the tokenizer says.
        query: what is put in front of a query.
        passage: what is put in front of a passage.
    """

    mode: Mode = "mean"
    normalise: bool = True
    length: int | None = None
    query: str = ""
    passage: str = ""

    def __str__(self) -> str:
        cut = f", {self.length} tokens at most" if self.length else ""
        return f"pooled by {self.mode}{', normalised' if self.normalise else ''}{cut}"


@dataclass(frozen=True)
class Embedder:
    """An encoder with its tokenizer and pooling.

    Attributes:
        hidden: the encoder.
        inputs: names of its inputs.
        tokenizer: as transformers has it.
        pooling: what follows.
    """

    hidden: Hidden
    inputs: Sequence[str]
    tokenizer: Any
    pooling: Pooling = field(default_factory=Pooling)


def pooling_of(folder: Path) -> Pooling:
    """Read ``modules.json`` of sentence-transformers and what it names; without one: the mean, normalised.

    Raises:
        InputError: a file is damaged, or a module is none of transformer, pooling and normalisation, or pools in a
            way that is not known.
    """
    listed = folder / "modules.json"
    if not listed.is_file():
        return Pooling()
    mode: Mode = "mean"
    normalise = False
    for module in _entries(listed):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            mode = _mode(folder / str(module.get("path", "")) / "config.json", folder)
        elif kind == "Normalize":
            normalise = True
        elif kind != "Transformer":
            raise InputError(f"{listed} names a module {kind!r}; want Transformer, Pooling and Normalize")
    length = _optional(folder / "sentence_bert_config.json").get("max_seq_length")
    prompts = _optional(folder / "config_sentence_transformers.json").get("prompts") or {}
    passage = next((prompts[name] for name in ("document", "passage", "corpus") if prompts.get(name)), "")
    return Pooling(mode, normalise, length, str(prompts.get("query") or ""), str(passage))


def embed(
    embedder: Embedder,
    texts: Sequence[str],
    *,
    prefix: str = "",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> NDArray[np.float32]:
    """One vector a text.

    Texts are run in batches of like length, padded to the longest of each, and returned in their own order.

    Args:
        embedder: the model.
        texts: what to embed.
        prefix: put in front of every text.
        progress: told what is done, how many texts are, and how many there are.

    Returns:
        float32 ``[texts, size]``.

    Raises:
        InputError: an embedding is not finite.
    """
    pooling = embedder.pooling
    ids = _tokens(embedder.tokenizer, [prefix + text for text in texts], pooling.length)
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    vectors: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(ids)
    for begin in range(0, len(order), BATCH):
        rows = order[begin : begin + BATCH]
        padded, mask = _padded([ids[row] for row in rows], embedder.tokenizer)
        known = {"input_ids": padded, "attention_mask": mask, "token_type_ids": np.zeros_like(padded)}
        states = embedder.hidden({name: known[name] for name in embedder.inputs})
        for row, vector in zip(rows, pool(states, mask, pooling), strict=True):
            vectors[row] = vector
        progress("embedding", min(begin + BATCH, len(order)), len(order))
    found = np.stack(vectors)
    if not np.isfinite(found).all():
        raise InputError("the model's embeddings are not finite; it is damaged")
    return found


def pool(states: NDArray[np.float32], mask: NDArray[np.int64], pooling: Pooling) -> NDArray[np.float32]:
    """``[texts, size]`` from hidden states ``[texts, tokens, size]`` and a mask ``[texts, tokens]`` of 1 and 0."""
    counts = mask[..., None].astype(np.float32)
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
    if pooling.mode == "mean":
        vectors = (states * counts).sum(1) / counts.sum(1)
    elif pooling.mode == "max":
        vectors = np.where(counts > 0, states, -np.inf).max(1)
    else:
        chosen = mask.argmax(1) if pooling.mode == "cls" else last
        vectors = states[np.arange(len(states)), chosen]
    if pooling.normalise:
        # As torch.nn.functional.normalize has it: a vector of zeros stays one.
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.asarray(vectors, np.float32)


def torch_hidden(model: Any) -> Hidden:
    """A transformers model as a function from its inputs to its last hidden states."""

    def hidden(arrays: Arrays) -> NDArray[np.float32]:
        with torch.inference_mode():
            out = model(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        if getattr(out, "last_hidden_state", None) is None:
            raise InputError(f"{type(model).__name__} gives no last hidden state, so it embeds no texts")
        return np.asarray(out.last_hidden_state.float().numpy(), np.float32)

    return hidden


def onnx_hidden(session: Any) -> Hidden:
    """An ONNX file as a function from its inputs to its first output of rank 3 that is not called logits.

    Raises:
        InputError: it has none, or takes other inputs than those of a text encoder.
    """
    names = [value.name for value in session.get_inputs()]
    if strange := set(names) - {"input_ids", "attention_mask", "token_type_ids"}:
        raise InputError(f"the model takes {', '.join(sorted(strange))}, so it is no encoder of texts")
    ranks = {value.name: len(value.shape or ()) for value in session.get_outputs()}
    output = next((name for name, rank in ranks.items() if rank == 3 and name != "logits"), None)
    if output is None:
        raise InputError("the model has no output [texts, tokens, size], so it embeds no texts")
    return lambda arrays: np.asarray(session.run([output], dict(arrays))[0], np.float32)


def _tokens(tokenizer: Any, texts: Sequence[str], length: int | None) -> list[list[int]]:
    """Token ids of each text, cut to ``length``."""
    most = min(length or tokenizer.model_max_length, tokenizer.model_max_length)
    cut = {"truncation": True, "max_length": most} if most < 1 << 30 else {}
    return [list(ids) for ids in tokenizer(list(texts), verbose=False, **cut)["input_ids"]]


def _padded(ids: Sequence[Sequence[int]], tokenizer: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids ``[texts, tokens]`` and their mask, padded on the side that the tokenizer pads on."""
    longest = max(map(len, ids))
    padded = np.full((len(ids), longest), tokenizer.pad_token_id or 0, np.int64)
    mask = np.zeros_like(padded)
    for row, own in enumerate(ids):
        place = slice(len(own)) if tokenizer.padding_side == "right" else slice(longest - len(own), None)
        padded[row, place], mask[row, place] = own, 1
    return padded, mask


def _mode(file: Path, folder: Path) -> Mode:
    """The one way of pooling that a configuration switches on, or names in newer versions."""
    if not file.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder / 'modules.json'} names {file}; want folders inside {folder}")
    said = read_json(file)
    on: list[Any] = [key for key, value in said.items() if key.startswith("pooling_mode_") and value is True]
    named = said.get("pooling_mode")
    modes = {FLAGS[key] for key in on if key in FLAGS} or {mode for mode in FLAGS.values() if mode == named}
    if len(modes) != 1 or len(on) > 1:
        raise InputError(f"{file} pools by {', '.join(on) or named}; want one of {', '.join(FLAGS.values())}")
    return modes.pop()


def _entries(file: Path) -> list[Mapping[str, Any]]:
    listed = read_json(file)
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise InputError(f"{file} is not a list of modules")
    return listed


def _optional(file: Path) -> Mapping[str, Any]:
    """What a JSON file holds, nothing where there is none."""
    said = read_json(file) if file.is_file() else {}
    return said if isinstance(said, dict) else {}
