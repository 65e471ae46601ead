"""What the eval, generate and simulate commands do: find model and tokenizer, then call what does the work."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .passes.errors import InputError
from .passes.frontend.batches import read_windows
from .passes.frontend.first_token import first_token, tokens_of
from .passes.frontend.load import load, load_tokenizer, tokenizer_beside
from .passes.frontend.positions import longest
from .passes.frontend.trace import trace
from .passes.fx.canonical import canonicalise, parameter_names
from .passes.fx.linears import find_linears
from .runtime.artifact import causal, context_of, onnx_of, open_artifact
from .runtime.embedding import Embedder, onnx_hidden, pooling_of, torch_hidden
from .runtime.evaluate import Perplexity, onnx_logits, perplexity, torch_logits
from .runtime.exact import ExactAnswers, exact_answers
from .runtime.generate import Generation
from .runtime.generate import generate as run_generate
from .runtime.inspection import weights as file_weights
from .runtime.retrieval import Retrieval, read_collection, retrieve
from .runtime.session import open_session
from .runtime.tensorrt.session import is_plan
from .simulator import Cycles
from .simulator import simulate as run_simulator

WINDOW = 2048
"""Tokens of an evaluation window, where the model takes as many."""


def evaluate(
    model: str,
    text: Path | None,
    *,
    exact: bool,
    window: int | None,
    windows: int | None,
    tokenizer: str | None,
    bos: bool,
    trust_remote_code: bool,
    progress: Callable[[str, int, int], None],
) -> tuple[Perplexity | None, ExactAnswers | None]:
    """Perplexity on ``text`` and exact answers of an exported file or of a pretrained model, by the same code.

    Raises:
        InputError: see ``load``, ``open_session``, ``read_windows``, ``perplexity`` and ``exact_answers``.
        NotBuiltError: see ``open_artifact``.
    """
    if is_export(Path(model)):
        logits = onnx_logits(causal(open_artifact(Path(model))))
        words, limit = tokenizer_of(Path(model), tokenizer), context_of(Path(model))
    else:
        pretrained = load(model, trust_remote_code=trust_remote_code)
        if pretrained.kind != "causal":
            raise InputError(f"{model} is not a causal language model, so it has no perplexity")
        logits, words, limit = torch_logits(pretrained.model), pretrained.tokenizer, longest(pretrained.model)
        if tokenizer is not None:
            words = load_tokenizer(tokenizer)
    if words is None:
        raise InputError(f"{model} has no tokenizer; give --tokenizer")
    if window is not None and limit is not None and window > limit:
        raise InputError(f"--window {window} is more than the {limit} tokens that {model} takes")
    found = answers = None
    if text is not None:
        length = window or min(WINDOW, limit or WINDOW)
        found = perplexity(
            logits, read_windows(text, words, samples=windows, length=length, bos=bos), progress=progress
        )
    if exact:
        answers = exact_answers(logits, words, limit=limit, bos=bos, progress=progress)
    return found, answers


def evaluate_retrieval(
    model: str,
    collection: Path,
    *,
    tokenizer: str | None,
    trust_remote_code: bool,
    progress: Callable[[str, int, int], None],
) -> tuple[Retrieval, Embedder]:
    """How well an exported file or a pretrained model finds passages, and how it was made to embed them.

    Raises:
        InputError: see ``load``, ``open_session``, ``pooling_of``, ``read_collection`` and ``retrieve``; or it is no
            encoder of texts in a folder of its own.
    """
    texts = read_collection(collection)
    if is_export(Path(model)):
        hidden, names = onnx_hidden(session := open_session(Path(model))), [i.name for i in session.get_inputs()]
        words, folder, limit = tokenizer_of(Path(model), tokenizer), _folder(Path(model)), context_of(Path(model))
    else:
        pretrained, folder = load(model, trust_remote_code=trust_remote_code), Path(model)
        if pretrained.kind != "encoder" or not pretrained.takes_text_alone:
            raise InputError(f"{model} is not an encoder of texts, so it finds no passages")
        if not folder.is_dir():  # how texts are pooled lies beside the weights
            raise InputError(f"--retrieval wants a model in a folder, or an exported one; got {model}")
        hidden, names, limit = torch_hidden(pretrained.model), list(pretrained.inputs), longest(pretrained.model)
        words = pretrained.tokenizer if tokenizer is None else load_tokenizer(tokenizer)
    if words is None:
        raise InputError(f"{model} has no tokenizer; give --tokenizer")
    pooling = pooling_of(folder)
    shorter = min((length for length in (pooling.length, limit) if length), default=None)
    embedder = Embedder(hidden, names, words, replace(pooling, length=shorter))
    return retrieve(embedder, texts, progress=progress), embedder


def generate(
    model: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    tokenizer: str | None,
    bos: bool,
    threads: int | None,
    kernels: bool,
) -> tuple[str, Generation]:
    """Continue a prompt, at most to the end of the model's context; returns the new text and what it took.

    Raises:
        InputError: see ``open_session`` and ``tokenizer_of``; or the prompt is empty, or fills the context.
        NotBuiltError: see ``open_artifact``.
    """
    if is_plan(model) and (threads is not None or not kernels):
        raise InputError(f"{'--threads' if threads else '--no-kernels'} has no effect on an engine")
    session = causal(open_artifact(model, threads=threads, kernels=kernels))
    words = tokenizer_of(model, tokenizer)
    ids = tokens_of(words, prompt, first_token(words) if bos else None)
    limit = context_of(model)
    if limit is not None:
        if len(ids) >= limit:
            raise InputError(f"the prompt has {len(ids)} tokens, and {model} takes {limit} with what it writes")
        max_new_tokens = min(max_new_tokens, limit - len(ids))
    eos = () if words.eos_token_id is None else (words.eos_token_id,)
    result = run_generate(session, [ids], max_new_tokens=max_new_tokens, eos=eos)
    return words.decode(result.tokens[0], skip_special_tokens=True), result


def simulate(
    model: str, *, tokens: int, paper_compat: bool, trust_remote_code: bool, progress: Callable[[str, int, int], None]
) -> list[Cycles]:
    """Cycles of every linear of an exported file or of a pretrained model, in its order.

    Raises:
        InputError: see ``load``, ``trace`` and ``inspect``; or nothing in it is a linear.
    """
    found = []
    for path, weight in _weights(model, trust_remote_code=trust_remote_code):
        found.append(run_simulator(path, weight, tokens=tokens, paper_compat=paper_compat))
        progress("simulating", len(found), 0)
    if not found:
        raise InputError(f"{model} has no linear with a weight of its own, so there is nothing to simulate")
    return found


def _weights(model: str, *, trust_remote_code: bool) -> Iterator[tuple[str, Tensor]]:
    """Path and weight ``[out_features, in_features]`` of every linear."""
    if is_export(Path(model)):
        for info, weight in file_weights(Path(model)):
            yield info.path, weight
        return
    program = trace(load(model, trust_remote_code=trust_remote_code)).program
    canonicalise(program)
    for linear in find_linears(program.graph_module.graph, parameter_names(program)):
        yield linear.path, program.state_dict[linear.weight].detach()


def _folder(model: Path) -> Path:
    """Where the configuration and the tokenizer of an exported file lie."""
    return model if model.is_dir() else model.parent


def is_export(path: Path) -> bool:
    """Whether a path is something this tool wrote, rather than a pretrained model."""
    return path.suffix == ".onnx" or is_plan(path) or (path / "model.onnx").is_file()


def tokenizer_of(model: Path, given: str | None) -> Any:
    """The tokenizer for an exported file: the one given, or the one beside it.

    A file says what it was made from, and anybody may have written that: it is never a reason to open another folder
    or to ask the network.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if given is not None:
        return load_tokenizer(given)
    onnx_of(model)
    words = tokenizer_beside(_folder(model))
    if words is None:
        raise InputError(f"{model} has no tokenizer beside it; give --tokenizer and the model that it was made from")
    return words
