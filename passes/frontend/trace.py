"""Trace a model once into one ATen graph: dynamic batch, sequence and past; the KV cache goes in and comes out."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.export import Dim, ExportedProgram

from ..errors import InputError
from .examples import example_of, open_axis
from .experts import experts_as_ops
from .kv_cache import MARGIN, cache_argument, cache_of, empty_past, held_by, uses_no_cache
from .load import TEXT_INPUTS, Pretrained
from .positions import first_position, longest, steady, steady_until
from .untraceable import sentence, why_not

LENGTHS = (3, 18, 80, 600)
"""Tokens of a text to trace with: more where the model takes no fewer, or cuts a text into parts of up to 256."""
PREFIX = "model."  # the wrapper's only attribute; module paths are reported without it


@dataclass(frozen=True)
class Traced:
    """A model as one graph whose weights are arguments.

    Attributes:
        program: the exported program (training IR); its ``state_dict`` holds the weights.
        inputs: names of the user inputs in order, cache included.
        outputs: names of the outputs in order, cache included.
        cache: ``(kv_heads, head_dim of keys, head_dim of values)`` of each cache layer; empty for encoders.
        kind: as in ``Pretrained``.
        first: the number of a text's first position; None where the model is told none.
        limit: tokens of a text at most, cache included, after which a run fails; None where nothing forbids more.
        sample: the shape of a sample that it was traced with, of the input that is no text; () where all are text.
        open_axis: the axis of such an input that may be of any length; None where there is none.
        size: what is to be said about the size of such an input; "" for text.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: tuple[tuple[int, int, int], ...]
    kind: str
    first: int | None = None
    limit: int | None = None
    sample: tuple[int, ...] = ()
    open_axis: int | None = None
    size: str = ""


class _Causal(nn.Module):
    """A decoder with its KV cache as plain tensors."""

    def __init__(self, model: nn.Module, cache_name: str, first: int | None, limit: int | None) -> None:
        super().__init__()
        self.model = model
        self.cache_name = cache_name
        self.first = first
        self.allowed = None if limit is None or first is None else nn.Buffer(torch.arange(first, first + limit))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]) -> Any:
        cache = cache_of(past)
        named: dict[str, Any] = {self.cache_name: cache}
        if self.first is not None:
            # Explicit positions: without them left padding is off by its length.
            places = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            # A place that is not in the table ends the run, where the model would be another one from there on.
            named["position_ids"] = places + self.first if self.allowed is None else self.allowed[places]
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **named)
        return output.logits, held_by(cache)


class _Encoder(nn.Module):
    """A model without a cache: named inputs in, every tensor of its output out."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(encoded(self.model, dict(zip(self.names, inputs, strict=True))).values())


def encoded(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that an encoder returns, by name; a decoder that is used as one keeps no cache."""
    output = model(**inputs, **uses_no_cache(model))
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def trace(pretrained: Pretrained, example: Mapping[str, Tensor] | None = None, *, any_length: bool = True) -> Traced:
    """Trace ``pretrained`` with ``torch.export``.

    Args:
        pretrained: the model.
        example: one batch of inputs by name, for models that do not take text; see ``example_of`` where it is left
            out.
        any_length: leave the length of sound open, where the model does.

    Raises:
        InputError: the model cannot be traced.
    """
    try:
        with torch.no_grad(), experts_as_ops(pretrained.model):
            if pretrained.kind == "causal":
                traced = _trace_causal(pretrained)
            elif pretrained.takes_text_alone:
                traced = _trace_text(pretrained)
            elif pretrained.inputs[0] == "input_ids":
                traced = _trace_mixed(pretrained, example)
            else:
                traced = _trace_samples(pretrained, example, any_length)
    except InputError:
        raise
    except Exception as error:  # what a model's own code raises, and what torch.export says of it, is of any kind
        raise InputError(f"{pretrained.source} {why_not(type(pretrained.model).__name__, error)}") from error
    if higher := _higher_order(traced.program):
        raise InputError(
            f"{pretrained.source} cannot be compiled: its graph calls {higher}, which ONNX has no form for"
        )
    for node in traced.program.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _is_off(node):
            raise InputError(f"{pretrained.source} draws random numbers ({node.target}), so it has no one output")
    return traced


def _plain(program: ExportedProgram) -> ExportedProgram:
    """The program without functions that call functions: masks are made by vmap, and some stay as such in the graph."""
    if not _higher_order(program):
        return program
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch's own tree utilities
        plain: ExportedProgram = program.run_decompositions({})
    return plain


def _higher_order(program: ExportedProgram) -> str:
    """The name of the first op that takes a function, or ""."""
    found = (n.target for n in program.graph.nodes if isinstance(n.target, HigherOrderOperator))
    return next((str(op) for op in found), "")


def _is_off(node: Any) -> bool:
    """Whether a dropout is that of evaluation, which does nothing; attention names one as well."""
    return "dropout" in str(node.target) or "attention" in str(node.target)


def _trace_causal(pretrained: Pretrained) -> Traced:
    cache_name = cache_argument(pretrained.model)
    assert cache_name is not None  # or it would be no decoder
    first, limit = first_position(pretrained.model), steady_until(pretrained.model)
    shapes = pretrained.cache
    batch, sequence, past = 2, 3, 5  # any sizes above 1: 0 and 1 would be taken for constants
    dtype = pretrained.model.dtype
    example = (
        torch.zeros(batch, sequence, dtype=torch.long),
        torch.ones(batch, past + sequence, dtype=torch.long),
        [
            (torch.zeros(batch, h, past, k, dtype=dtype), torch.zeros(batch, h, past, v, dtype=dtype))
            for h, k, v in shapes
        ],
    )
    b, s, p = Dim("batch", min=1), Dim("sequence", min=1), Dim("past", min=0)
    dynamic = ({0: b, 1: s}, {0: b, 1: Dim.DYNAMIC}, [({0: b, 2: p}, {0: b, 2: p}) for _ in shapes])
    module = _Causal(pretrained.model, cache_name, first, limit)
    with steady(pretrained.model):
        try:
            program = torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
        except torch._dynamo.exc.UserError:
            # Named sizes promise that any number is taken; a table of positions bounds them. DYNAMIC lets it say so.
            open_ = Dim.DYNAMIC
            dynamic = ({0: b, 1: open_}, {0: b, 1: open_}, [({0: b, 2: open_}, {0: b, 2: open_}) for _ in shapes])
            program = torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
        _check_without_past(pretrained, program, first)
    layers = [(f"{i}.key", f"{i}.value") for i in range(len(shapes))]
    return Traced(
        program=_plain(program),
        inputs=("input_ids", "attention_mask", *(f"past_key_values.{name}" for pair in layers for name in pair)),
        outputs=("logits", *(f"present.{name}" for pair in layers for name in pair)),
        cache=shapes,
        kind="causal",
        first=first,
        limit=limit,
    )


def _check_without_past(pretrained: Pretrained, program: ExportedProgram, first: int | None) -> None:
    """Refuse a model whose code takes another way where there is no past, or with padding, than the one traced."""
    ids = _texts(pretrained, LENGTHS[0] + 4)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    places = {} if first is None else {"position_ids": first + (mask.cumsum(-1) - 1).clamp(min=0)}
    alone = uses_no_cache(pretrained.model)
    told = pretrained.model(input_ids=ids, attention_mask=mask, **alone, **places).logits[mask == 1]
    try:
        past = empty_past(pretrained.cache, len(ids), pretrained.model.dtype)
        got = program.module(check_guards=False)(ids, mask, past)[0][mask == 1]
    except Exception:  # a size that was made a constant meets another one in some op
        got = torch.empty(0)
    if got.shape == told.shape and not bool(((got - told).abs() > MARGIN * told.abs().max()).any()):
        return
    raise InputError(
        f"{pretrained.source} cannot be compiled: traced with a past, the graph of {type(pretrained.model).__name__} "
        "is another than the model without one"
    )


def _trace_text(pretrained: Pretrained) -> Traced:
    """As short a text as the model takes, and as its graph holds for others of: a size of one part is a constant."""
    _check_padding(pretrained)
    limit = longest(pretrained.model)
    tried = [length for length in LENGTHS if limit is None or 2 * length < limit] or [min(LENGTHS[0], limit or 1)]
    why = None
    for length in tried:
        # A text is as long as the position table allows; DYNAMIC lets the graph state that bound.
        inputs = _texts(pretrained, length)
        try:
            _run(pretrained, inputs)
        except InputError as error:  # some take no text shorter than so much
            why = why or error
            continue
        traced = _exported(pretrained, inputs, {name: {1: Dim.DYNAMIC} for name in inputs})
        if all(_holds(pretrained, traced, _texts(pretrained, other)) for other in _others(length, limit)):
            return traced
        why = InputError(
            f"{pretrained.source} cannot be compiled: traced with {length} tokens, the graph of "
            f"{type(pretrained.model).__name__} holds for no other number of them"
        )
    assert why is not None
    raise why


def _others(length: int, limit: int | None) -> list[int]:
    """Lengths that the graph of one length is tried with: the next, twice as many, and a long one."""
    most = min(limit or LENGTHS[-1], LENGTHS[-1])
    return [other for other in (length + 1, 2 * length, most) if limit is None or other <= limit]


def _texts(pretrained: Pretrained, length: int) -> dict[str, Tensor]:
    """Two texts without padding, the same on every run."""
    known = getattr(pretrained.model.config.get_text_config(), "vocab_size", None) or length
    ids = torch.arange(2 * length).reshape(2, length) % max(1, min(known, 2 * length) - 3) + 3
    made = {"input_ids": ids.clamp(max=known - 1), "token_type_ids": torch.zeros_like(ids)}
    return {name: made.get(name, torch.ones_like(ids)) for name in pretrained.inputs}


def _holds(pretrained: Pretrained, traced: Traced, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the graph returns what the model does."""
    try:
        told = encoded(pretrained.model, inputs).values()
    except Exception:  # what the model itself does not take, nobody can hold against its graph
        return True
    try:
        got = traced.program.module(check_guards=False)(*inputs.values())
    except Exception:  # a size that was made a constant meets another one in some op
        return False
    same = zip(got, told, strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=MARGIN, atol=MARGIN, equal_nan=True) for a, b in same)


def _trace_samples(pretrained: Pretrained, given: Mapping[str, Tensor] | None, any_length: bool) -> Traced:
    """Pictures or sound. Sound may be of any length where the model takes it so."""

    def run(inputs: Mapping[str, Tensor]) -> None:
        encoded(pretrained.model, inputs)

    example = example_of(pretrained, run, given)
    # A batch of two, so that the batch is not taken for a constant.
    inputs = {name: x.expand(2, *x.shape[1:]).contiguous() for name, x in example.items()}
    (name,) = pretrained.inputs
    sample = tuple(example[name].shape[1:])
    fixed = f"the file takes {name} of {list(sample)} a sample and of no other size"
    axis = open_axis(run, example) if any_length else None
    if axis is None:
        why = ", as the model does" if any_length else ""
        return replace(_exported(pretrained, inputs, {}), sample=sample, size=fixed + why)
    try:
        traced = _exported(pretrained, inputs, {name: {axis: Dim.DYNAMIC}})
    except torch._dynamo.exc.UserError as error:
        why = f"the model takes others, but torch.export does not follow it: {sentence(error)}"
        return replace(_exported(pretrained, inputs, {}), sample=sample, size=f"{fixed}; {why}")
    size = f"the file takes {name} of any length in place of {sample[axis - 1]}"
    return replace(traced, sample=sample, open_axis=axis, size=size)


def _trace_mixed(pretrained: Pretrained, given: Mapping[str, Tensor] | None) -> Traced:
    """Text and pictures (or sound) at once, as many of the one as of the other or, where the model does, not."""
    _check_padding(pretrained)
    known = [name for name in pretrained.inputs if name in TEXT_INPUTS]
    text = {name: torch.full((2, 3), 0 if name == "token_type_ids" else 1) for name in known}
    (name,) = set(pretrained.inputs) - set(known)

    def run(inputs: Mapping[str, Tensor]) -> None:
        encoded(pretrained.model, {**{n: x[:1] for n, x in text.items()}, **inputs})

    example = example_of(replace(pretrained, inputs=(name,)), run, given)[name]
    inputs = {**text, name: example.expand(2, *example.shape[1:]).contiguous()}
    sample = tuple(example.shape[1:])
    axes: dict[str, Any] = {n: {1: Dim.DYNAMIC} for n in text}
    size = f"the file takes {name} of {list(sample)} a sample and of no other size"
    try:
        encoded(pretrained.model, {**inputs, name: inputs[name][:1]})
        axes[name] = {0: Dim(f"{name}_batch", min=1)}
        return replace(_exported(pretrained, inputs, axes), sample=sample, size=size)
    except Exception:  # a model of pairs takes as many texts as pictures: its own code or torch.export says so
        return replace(_exported(pretrained, inputs, {**axes, name: {}}), sample=sample, size=size)


def _exported(pretrained: Pretrained, inputs: Mapping[str, Tensor], opened: Mapping[str, Mapping[int, Any]]) -> Traced:
    """The program of an encoder whose batch may be of any size, and further axes of an input as ``opened`` says."""
    batch = Dim("batch", min=1)
    module = _Encoder(pretrained.model, pretrained.inputs)
    dynamic = (tuple({0: batch, **opened.get(name, {})} for name in inputs),)
    names = tuple(_run(pretrained, inputs))
    program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=dynamic, strict=False)
    return Traced(program=_plain(program), inputs=pretrained.inputs, outputs=names, cache=(), kind="encoder")


def _run(pretrained: Pretrained, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return encoded(pretrained.model, inputs)
    except Exception as error:  # a model's own code refuses what it does not take by whatever it likes
        given = " and ".join(f"{name} {list(x.shape)}" for name, x in inputs.items())
        raise InputError(
            f"{pretrained.source} cannot be compiled: {type(pretrained.model).__name__} does not run on "
            f"{given} alone ({sentence(error)})"
        ) from error


def _check_padding(pretrained: Pretrained) -> None:
    """A decoder that classifies reads the last token that is no padding, and takes one text only if it knows none."""
    model = pretrained.model
    classifies = type(model).__name__.endswith("ForSequenceClassification") and cache_argument(model) is not None
    if classifies and getattr(model.config.get_text_config(), "pad_token_id", None) is None:
        raise InputError(
            f"{pretrained.source} has no padding token, without which it classifies one text at a time; "
            "set pad_token_id in its config.json"
        )
