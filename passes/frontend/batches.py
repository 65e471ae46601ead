"""Calibration batches: windows of a text, ``.npz`` files, or text that the model writes itself."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import InputError
from ..files import check_regular
from .first_token import first_token
from .kv_cache import cache_argument, empty_past
from .load import Pretrained
from .npz import load_npz
from .trace import Traced

CHECK_TOKENS = 64
LARGEST_TEXT = 4 << 30
"""Bytes of a text: more is a mistake."""
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Batch:
    """One batch of a traced model's inputs.

    Attributes:
        inputs: in the order of the graph's user inputs, an empty past included.
        token_mask: bool ``[batch, sequence]``, False for padding; None where every position counts.
        cached: how many of the inputs, from the end, are the cache.
    """

    inputs: tuple[Tensor, ...]
    token_mask: Tensor | None
    cached: int = 0

    def texts(self) -> list["Batch"]:
        """The rows of the batch, each a batch."""
        masks = [None if self.token_mask is None else self.token_mask[row : row + 1] for row in range(self.rows)]
        return [
            Batch(tuple(x[row : row + 1] for x in self.inputs), mask, self.cached) for row, mask in enumerate(masks)
        ]

    @property
    def rows(self) -> int:
        """How many texts, or other samples, there are."""
        return len(self.inputs[0])

    def counted(self, output: Tensor) -> Tensor:
        """The rows of an output that belong to tokens that count, ``[tokens, features]``; all where it has others."""
        rows, mask = output.flatten(end_dim=-2), self.token_mask
        return rows if mask is None or mask.numel() != len(rows) else rows[mask.reshape(-1)]

    def head(self) -> "Batch":
        """The first ``CHECK_TOKENS`` tokens, padding in front left out, or the first sample: enough to check a fold."""
        own = self.inputs[: len(self.inputs) - self.cached]
        past = [x[:1] for x in self.inputs[len(own) :]]
        if any(x.dim() != 2 or x.is_floating_point() for x in own):
            mask = None if self.token_mask is None else self.token_mask[:1]
            return Batch((*(x[:1] for x in own), *past), mask, self.cached)
        begin = 0 if self.token_mask is None else int(self.token_mask[0].int().argmax())
        window = slice(begin, begin + CHECK_TOKENS)
        mask = None if self.token_mask is None else self.token_mask[:1, window]
        return Batch((*(x[:1, window] for x in own), *past), mask, self.cached)


def token_batches(
    traced: Traced, windows: Tensor, *, names: Sequence[str], tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[Batch]:
    """Cut token windows into batches of a traced text model.

    Args:
        traced: the model.
        windows: int64 ``[samples, length]``.
        names: the text inputs the graph takes, cache left out.
        tokens_per_batch: how many tokens run at once; more costs memory, fewer costs time.
    """
    rows = max(1, tokens_per_batch // windows.shape[1])
    batches = []
    for ids in torch.split(windows, rows):
        known = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        past = [x for pair in empty_past(traced.cache, len(ids)) for x in pair]
        batches.append(Batch((*(known[name] for name in names), *past), None, len(past)))
    return batches


@dataclass(frozen=True)
class Texts:
    """Texts of different lengths as an encoder reads them, special tokens included.

    Attributes:
        ids: token ids of each.
        types: of each token, which of a pair of texts it belongs to.
    """

    ids: tuple[tuple[int, ...], ...]
    types: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Of all texts together."""
        return sum(map(len, self.ids))


def padded_batches(
    traced: Traced, texts: Texts, *, names: Sequence[str], padding: int, tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[Batch]:
    """Put texts of like length together, padded behind to the longest of each batch.

    The batches come in no order of length, so that those of one part of them, such as what is held out, are of any.

    Args:
        traced: the model, an encoder that takes an ``attention_mask``.
        texts: what to batch.
        names: the inputs the graph takes.
        padding: the token that pads.
        tokens_per_batch: how many tokens run at once, padding included; one text may have more.
    """
    order = sorted(range(len(texts)), key=lambda index: len(texts.ids[index]))
    groups: list[list[int]] = []
    for index in order:
        if not groups or (len(groups[-1]) + 1) * len(texts.ids[index]) > tokens_per_batch:
            groups.append([])
        groups[-1].append(index)
    batches = []
    for place in torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist():
        group = groups[place]
        shape = (len(group), len(texts.ids[group[-1]]))
        known = {
            "input_ids": torch.full(shape, padding),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "token_type_ids": torch.zeros(shape, dtype=torch.long),
        }
        for row, index in enumerate(group):
            own = slice(len(texts.ids[index]))
            known["input_ids"][row, own] = torch.tensor(texts.ids[index])
            known["attention_mask"][row, own] = 1
            known["token_type_ids"][row, own] = torch.tensor(texts.types[index])
        batches.append(Batch(tuple(known[name] for name in names), known["attention_mask"].bool()))
    return batches


def read_texts(path: Path, tokenizer: Any, *, tokens: int, length: int, bos: bool = True) -> Texts:
    """Tokenize texts one by one, each with the special tokens that the tokenizer puts around it.

    Args:
        path: plain text, whose texts have blank lines between them; or JSONL, a text a line in the field ``text``, and
            where that is one of a pair, as rerankers take, the other in ``text_pair``.
        tokenizer: the model's.
        tokens: texts are read until they have so many.
        length: tokens of a text at most; a longer one is cut into several, and of a pair the end is left out.
        bos: put special tokens around every text.

    Raises:
        InputError: the file cannot be read, holds no text, or is not JSONL with ``text`` on every line.
    """
    pairs = _split_texts(path)
    ids: list[tuple[int, ...]] = []
    types: list[tuple[int, ...]] = []
    for begin in range(0, len(pairs), 64):
        some = pairs[begin : begin + 64]
        for alone in (True, False):
            chosen = [pair for pair in some if (pair[1] is None) == alone]
            if not chosen:
                continue
            made = tokenizer(
                [text for text, _ in chosen],
                None if alone else [other for _, other in chosen],
                add_special_tokens=bos,
                truncation=True,
                max_length=length,
                return_overflowing_tokens=alone,
                return_token_type_ids=True,
                verbose=False,
            )
            ids += [tuple(text) for text in made["input_ids"]]
            types += [tuple(text) for text in made["token_type_ids"]]
        if sum(map(len, ids)) >= tokens:
            break
    count, seen = 0, 0
    while count < len(ids) and seen < tokens:
        seen += len(ids[count])
        count += 1
    return Texts(tuple(ids[:count]), tuple(types[:count]))


def _split_texts(path: Path) -> list[tuple[str, str | None]]:
    """The texts of a file, each with the other one of its pair or None."""
    whole = read_text(path)
    if path.suffix != ".jsonl":
        return [(text.strip(), None) for text in re.split(r"\n\s*\n", whole) if text.strip()]
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    found = [(entry["text"], entry.get("text_pair")) for entry in entries if entry["text"].strip()]
    if wrong := next((other for _, other in found if other is not None and not isinstance(other, str)), None):
        raise InputError(f"{path}: a text_pair is {wrong!r}; want a string")
    return found


def read_windows(path: Path, tokenizer: Any, *, samples: int | None, length: int, bos: bool = True) -> Tensor:
    """Tokenize a text as one string and cut it into windows.

    Args:
        path: plain text, or JSONL whose lines hold a ``text`` field.
        tokenizer: the model's.
        samples: how many windows at most; None for all.
        length: tokens in a window, the one in front included.
        bos: put in front of every window what the tokenizer puts in front of a text; see ``first_token``.

    Returns:
        int64 ``[samples, length]``; fewer rows if the text is shorter than asked for.

    Raises:
        InputError: the file cannot be read, is empty, or is shorter than one window of 2 tokens.
    """
    text = read_text(path)
    # A prefix is enough for a few windows: few texts have 16 characters a token, and those are read whole.
    prefix = text if samples is None else text[: samples * length * 16]
    ids = tokenizer(prefix, add_special_tokens=False, verbose=False)["input_ids"]
    if samples is not None and len(ids) < samples * length and len(prefix) < len(text):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise InputError(f"{path} holds {len(ids)} tokens; calibration and evaluation need at least 2")
    first = first_token(tokenizer) if bos else None
    own = min(length - (first is not None), len(ids))
    count = len(ids) // own if samples is None else min(samples, len(ids) // own)
    windows = torch.tensor(ids[: count * own]).reshape(count, own)
    return windows if first is None else torch.cat([torch.full((count, 1), first), windows], dim=1)


def read_text(path: Path) -> str:
    """A file's text; of a JSONL file, its ``text`` fields joined by blank lines.

    Raises:
        InputError: the file cannot be read, holds no text, or is not JSONL with a ``text`` field on every line.
    """
    check_regular(path, most=LARGEST_TEXT)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if path.suffix == ".jsonl":
        try:
            text = "\n\n".join(json.loads(line)["text"] for line in text.split("\n") if line.strip())
            text.encode()
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # halves of surrogate pairs included
            raise InputError(f"{path} is not JSONL with a text field on every line: {error!r}") from error
    if not text.strip():
        raise InputError(f"{path} is empty; want text to calibrate or evaluate on")
    return text


def read_npz(folder: Path, traced: Traced, *, samples: int | None) -> list[Batch]:
    """Read calibration inputs from ``.npz`` files, one batch a file, arrays named like the model's inputs.

    Raises:
        InputError: the folder has no such file, or an array is missing, holds no numbers, or has another batch size.
    """
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise InputError(f"{folder} holds no .npz file; want one a batch, with arrays named like the model's inputs")
    names = [n for n in traced.inputs if not n.startswith("past_key_values.")]
    batches = []
    for file in files[:samples]:
        arrays = load_npz(file)
        if missing := [n for n in names if n not in arrays]:
            raise InputError(f"{file} lacks {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
        own = [arrays[n] for n in names]
        if any(x.dim() == 0 or len(x) != len(own[0]) or len(x) == 0 for x in own):
            sizes = ", ".join(f"{n} {list(x.shape)}" for n, x in zip(names, own, strict=True))
            raise InputError(f"{file}: want the same number of samples in every array, at least 1; got {sizes}")
        _check_arrays(file, dict(zip(names, own, strict=True)), _rows_of_tables(traced))
        past = [x for pair in empty_past(traced.cache, len(own[0])) for x in pair]
        mask = arrays["attention_mask"].bool() if "attention_mask" in names else None
        batches.append(Batch((*own, *past), mask, len(past)))
    return batches


def _check_arrays(file: Path, arrays: Mapping[str, Tensor], rows: Mapping[str, int]) -> None:
    """Refuse what a model of text would read in another sense than it was meant, or could not read.

    Raises:
        InputError: a mask of other values than 0 and 1 or of another shape than the tokens, floats where rows of a
            table are numbered, or a number that the table does not have.
    """
    for name, most in rows.items():
        given = arrays[name]
        if given.is_floating_point() or bool((given < 0).any()) or bool((given >= most).any()):
            raise InputError(
                f"{file}: {name} holds {given.dtype} from {given.min():g} to {given.max():g}; want whole numbers from "
                f"0 to {most - 1}, which the model has"
            )
    if "input_ids" not in arrays:
        return
    shape = list(arrays["input_ids"].shape)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        given = arrays.get(name, arrays["input_ids"])
        if given.dim() != 2 or list(given.shape) != shape:
            raise InputError(f"{file}: {name} is {list(given.shape)}; want [texts, tokens] like input_ids {shape}")
    mask = arrays.get("attention_mask")
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(
            f"{file}: attention_mask holds {mask.min():g} to {mask.max():g}; want 1 for tokens and 0 for padding"
        )


def _rows_of_tables(traced: Traced) -> dict[str, int]:
    """How many rows the table has that an input chooses from, by the name of the input."""
    specs = traced.program.graph_signature.input_specs
    users = [str(spec.arg.name) for spec in specs if spec.kind.name == "USER_INPUT"]
    names = dict(zip(users, traced.inputs, strict=True))
    rows: dict[str, int] = {}
    for node in traced.program.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and node.args[1].name in names:
            rows[names[node.args[1].name]] = int(node.args[0].meta["val"].shape[0])
    return rows


def written_by_itself(
    pretrained: Pretrained,
    *,
    samples: int,
    length: int,
    seed: int,
    bos: bool = True,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Tensor:
    """Calibration text sampled from the model, so that no data set is needed; cached by weights and settings.

    Every row starts from the beginning-of-text token and is sampled at temperature 1 over the whole vocabulary. With
    ``bos`` the token stays where the tokenizer puts it in front of a text, see ``first_token``.

    Returns:
        int64 ``[samples, length]``.

    Raises:
        InputError: the model does not generate text, or its beginning-of-text token is outside its vocabulary.
    """
    model = pretrained.model
    if pretrained.kind != "causal":
        raise InputError(f"{pretrained.source} does not generate text to calibrate on; give --calibration FILE")
    first = first_token(pretrained.tokenizer) if bos and pretrained.tokenizer is not None else None
    kept = {} if first is None else {"first": first}
    cache = _cache_file(pretrained, samples=samples, length=length, seed=seed, **kept)
    if cache.is_file():
        return load_npz(cache)["input_ids"]
    config = model.config.get_text_config()  # of a multimodal model, the part that knows tokens
    start = getattr(config, "bos_token_id", None) if first is None else first
    if start is None:
        start = getattr(config, "eos_token_id", None) or 0
    start = start if isinstance(start, int) else start[0]
    if not 0 <= start < config.vocab_size:
        last = config.vocab_size - 1
        raise InputError(f"{pretrained.source} begins a text with token {start}; the model knows 0 to {last}")
    rows = []
    chunk = 64  # rows sampled at once: their caches and logits are in memory together
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for begin in range(0, samples, chunk):
            count = min(chunk, samples - begin)
            ids = torch.full((count, 1), start)

            def step(tokens: int, begin: int = begin, count: int = count) -> None:
                progress("writing calibration text", begin * length + tokens * count, samples * length)

            rows.append(_sample(model, ids, length, step))
    windows = torch.cat(rows)[:, 1:] if first is None else torch.cat(rows)[:, :-1]
    _write_cache(cache, windows)
    return windows


def _sample(model: Any, ids: Tensor, length: int, step: Callable[[int], None]) -> Tensor:
    """``ids`` and ``length`` sampled tokens after them, ``[rows, 1 + length]``, with the model's own cache."""
    name = cache_argument(model)
    if name is None:
        raise InputError(
            "the model's forward takes no KV cache, so it cannot write calibration text; give --calibration FILE"
        )
    cache = DynamicCache(config=model.config)
    text = ids
    while text.shape[1] <= length:
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
        probabilities = output.logits[:, -1].softmax(-1)
        if not bool(probabilities.isfinite().all()):
            raise InputError("the model's own logits hold NaN; its weights are damaged")
        ids = _draw(probabilities)
        text = torch.cat([text, ids], dim=1)
        step(text.shape[1] - 1)
    return text


def _draw(probabilities: Tensor) -> Tensor:
    """Draw one token a row by inverting the distribution function; ``torch.multinomial`` draws one number a token.

    Args:
        probabilities: ``[rows, vocabulary]``, finite.

    Returns:
        int64 ``[rows, 1]``.
    """
    upto = probabilities.cumsum(-1)
    point = torch.rand(len(upto), 1) * upto[:, -1:]  # the sum is 1 but for rounding
    return torch.searchsorted(upto, point, right=True).clamp(max=upto.shape[-1] - 1)


def _cache_file(pretrained: Pretrained, **settings: int) -> Path:
    """Named by everything that decides the text: settings, configuration, and every weight, bit by bit."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(pretrained.model.config.to_json_string().encode())
    for name, weight in sorted(pretrained.model.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(
            weight.detach().contiguous().view(torch.uint8).numpy() if weight.dim() else str(weight.item()).encode()
        )
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "sparsify-export" / f"self-{digest.hexdigest()[:24]}.npz"


def _write_cache(file: Path, windows: Tensor) -> None:
    """Keep the text for the next run; where that is not possible, the next run writes it again."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(beside, input_ids=windows.numpy())
        beside.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
