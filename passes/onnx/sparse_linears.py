"""Prune the linears of an ONNX model where that was asked for, and replace those with sparse weights by our ops."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch

from ...calibrate import masks
from ...calibrate.patterns import NM, Pattern, Unstructured, find_pattern
from ..cost import Worth
from ..dialect.packed import Packed, pack, packed_bytes
from ..dialect.storage import FLOATS, FP32, Storage
from ..errors import InputError
from ..parts import ONE
from ..recipe import Recipe
from ..skip import named_by
from .fit import EMPTY, ZERO, Fitted, keep_of, score_of
from .head import gives_output
from .left_out import LeftOut
from .linears import Linear
from .parts import parts_of
from .sections import Shared
from .spool import Spool
from .view import Model, Place

BFLOAT16_SINCE = 13
"""The opset that brought Cast from and to bfloat16, which the bodies of our ops need."""

LARGER = "packed it would take"
"""How the reason begins where a packed weight would not be smaller."""
WORTHWHILE = 0.05
"""The share of the weights that shall be pruned which must get smaller by it; less is called no success."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sparse:
    """A linear whose weight is sparse now, and what the file will hold.

    Attributes:
        linear: the linear as found.
        pattern: the pattern of its zeros.
        sparsity: fraction of zeros, counted.
        retained: score that was kept, before an update chose its own mask; None where nothing was pruned.
        op: one of the dialect's ops, or ``MatMul`` where only standard ops are wanted.
        storage: of the packed values, which says what the op does to its activations.
        attributes: of the sparse op.
        packed: its packed tensors, in the spool; those of a weight that several linears share are the same objects.
        dense: the weight as the file will hold it, in the spool, float, the way round that the model had it and
            without the linear's factor; float32 where its packed form is quantised.
        stored_bytes: its weight in the file.
        fitted: how the weight was pruned and fitted to its inputs; None where it only got zeros.
    """

    linear: Linear
    pattern: str
    sparsity: float
    retained: float | None
    op: str
    storage: Storage
    attributes: Mapping[str, int]
    packed: tuple[onnx.TensorProto, ...]
    dense: onnx.TensorProto
    stored_bytes: int
    fitted: Fitted | None = None

    @property
    def note(self) -> str:
        """What changed besides the weight; "" for nothing."""
        if self.linear.note and self.storage.quantised:
            return "its activations are rounded to 8 bits token by token, no longer all together"
        return self.linear.note


def choose(model: Model, linears: Sequence[Linear], recipe: Recipe) -> dict[Place, str]:
    """Why each linear is not pruned, by its place (names may repeat); "" for those that will be.

    What gives the model's output (the head) is left alone, as in every model that this tool prunes, unless there is
    nothing else.

    Raises:
        InputError: nothing is left, or ``--skip`` matches nothing.
    """
    for glob in recipe.skip:
        if not any(named_by(glob, linear.path) for linear in linears):
            known = f", e.g. {linears[0].path}" if linears else ""
            raise InputError(f"--skip {glob} matches none of the {len(linears)} linears{known}")
    reasons = {linear.place: _why_not(linear, recipe) for linear in linears}
    heads = [linear.place for linear in linears if not reasons[linear.place] and gives_output(model, linear)]
    if len(heads) < sum(not reason for reason in reasons.values()):
        reasons |= {place: "it gives the model's output, which is not pruned" for place in heads}
    return reasons


def _why_not(linear: Linear, recipe: Recipe) -> str:
    if any(named_by(glob, linear.path) for glob in recipe.skip):
        return "skipped by --skip"
    if isinstance(recipe.pattern, NM) and linear.weight.shape[1] % recipe.pattern.m:
        return f"in_features {linear.weight.shape[1]} is not a multiple of {recipe.pattern.m}"
    return ""


def make_sparse(
    model: Model,
    linears: Sequence[Linear],
    recipe: Recipe | None,
    fitted: Mapping[str, Fitted | str] | None = None,
    *,
    storage: Storage,
    sparse_ops: bool,
    packed: Spool,
    dense: Spool,
    known: Sequence[LeftOut] = (),
    worth: Worth | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[list[Sparse], list[LeftOut]]:
    """Prune the weights that ``recipe`` asks for and pack all that are sparse; one weight in memory at a time.

    Before:  y = alpha x W^T + b                    W constant, in any form that ``weights`` reads
    After:   the parts of y = sparsify.linear_nm(x, values, indices, b), or of another of our ops, for
             ``replace_linears``
    Left alone: dense weights; linears that ``choose`` names; weights of which the packed form would not be smaller
        than what the file holds now or, by ``worth``, slower, and those are not pruned either.
    Numerics: the same products; values are rounded once to the storage. Quantised weights are dequantised first. With
        int8 and int4 storage the activations are quantised too, each token by itself.

    Args:
        model: where the linears are from.
        linears: those that can be lowered.
        recipe: how to prune; None prunes nothing.
        fitted: by the weight's name, all that the recipe prunes as they were pruned on their inputs, or why they were
            not; None prunes here, by the weights alone.
        storage: how packed values are stored; values that the model holds in 16 bits stay as they are unless this
            is int8 or int4.
        sparse_ops: False keeps the ops and only sets weights to zero.
        packed: where packed tensors go.
        dense: where the same weights go unpacked.
        known: what ``find_linears`` left out, for the sentence that says why nothing can be pruned.
        worth: asked for every weight that could be lowered, as in ``fx.rewrite``; None lowers all of them.
        progress: told about every weight.

    Raises:
        InputError: a weight or a norm holds NaN, a value does not fit the storage, or the model's opset is too old
            for it.
    """
    if sparse_ops and storage.kind == "bf16" and model.opset < BFLOAT16_SINCE:
        raise InputError(
            f"{model.path} uses ONNX opset {model.opset}, which cannot read bf16; "
            f"want {BFLOAT16_SINCE} or newer, or fp16"
        )
    reasons = choose(model, linears, recipe) if recipe is not None else {linear.place: "" for linear in linears}
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(linear.weight.name, []).append(linear)
    done: list[Sparse] = []
    left: list[LeftOut] = []
    for index, (name, group) in enumerate(groups.items()):
        progress("pruning" if recipe and fitted is None else "lowering", index, len(groups))
        reason = next((reasons[linear.place] for linear in group if reasons[linear.place]), "")
        if not reason:
            try:
                one = Shared(tuple(group), parts_of(model, group) if recipe is not None else ONE, ())
                its = None if fitted is None else fitted[name]
                if isinstance(its, str):
                    made: list[Sparse] | str = its
                else:
                    made = _make(one, recipe, its, storage, sparse_ops, packed, dense, worth)
            except ValueError as error:
                raise InputError(f"{group[0].path}: {error}") from error
            if isinstance(made, str):
                reason = made
            else:
                done += made
        left += [LeftOut(x.path, x.op, x.weight.shape, x.weight.stored_bytes, reason) for x in group if reason]
    if recipe is not None and not done:
        raise InputError(f"no linear of {model.path} can be pruned{_reasons([*known, *left])}")
    larger = [entry for entry in left if recipe is not None and entry.reason.startswith(LARGER)]
    numbers = sum(x.linear.weight.shape[0] * x.linear.weight.shape[1] for x in done)
    if numbers < WORTHWHILE * (numbers + sum(x.shape[0] * x.shape[1] for x in larger)):
        raise InputError(
            f"only {len(done)} of {len(done) + len(larger)} linears of {model.path} would get smaller{_reasons(larger)}"
        )
    return done, left


def _reasons(left: Sequence[LeftOut]) -> str:
    """Every reason once, with an example and how many more there are."""
    groups: dict[str, list[LeftOut]] = {}
    for entry in left:
        groups.setdefault(entry.reason, []).append(entry)
    told = []
    for reason, entries in sorted(groups.items(), key=lambda item: -len(item[1])):
        others = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
        told.append(f"{entries[0].path}{others}: {reason}")
    return "; " + "; ".join(told) if told else ": it has no product with a constant weight"


def _make(
    weight: Shared,
    recipe: Recipe | None,
    fitted: Fitted | None,
    storage: Storage,
    sparse_ops: bool,
    packed: Spool,
    dense: Spool,
    worth: Worth | None,
) -> list[Sparse] | str:
    """One weight and the linears that share it; a reason if it stays as it is."""
    group, source = weight.linears, weight.linears[0].weight
    values = source.read() if fitted is None else fitted.read()
    if not bool(values.isfinite().all()):
        raise ValueError("its weight holds NaN or infinity")
    retained = None
    pattern: Pattern | None
    if not bool(values.any()):
        return ZERO
    if recipe is None:
        pattern = find_pattern(values)
        if pattern is None:
            return "the weight is dense"
    else:
        pattern = recipe.pattern
        if fitted is None:
            score = score_of(values, weight.parts, recipe, None, None)
            keep = keep_of(score, weight.parts, recipe)
            retained = masks.retained(score, keep)
            values = torch.where(keep, values, 0.0)  # literal +0.0, never -0.0
            del score, keep
            if not bool(values.any()):
                return EMPTY
        else:
            retained = fitted.retained_before
    largest = float(values.abs().max())
    if largest * values.shape[1] > torch.finfo(torch.float32).max:
        raise ValueError(
            f"its weights reach {largest:.3g}, so that a sum of {values.shape[1]} products overflows float32"
        )
    nonzeros = int(values.count_nonzero())
    sparsity, name = 1 - nonzeros / max(1, values.numel()), _text(pattern)
    if recipe is None and not sparse_ops:
        return "--ops standard"
    if fitted is None:
        used = stored_as(weight, values.dtype, nonzeros, pattern, storage, sparse_ops=sparse_ops, worth=worth)
    else:  # it was asked before it was pruned, and stays so if that made it some bytes larger than was thought
        used = stored_as(weight, values.dtype, 0, pattern, storage, sparse_ops=sparse_ops, worth=None)
    if isinstance(used, str):
        return used
    if not sparse_ops:
        proto = dense.add(source.value, values if source.rows_first else values.T)
        size = source.stored_bytes
        return [Sparse(x, name, sparsity, retained, "MatMul", FP32, {}, (), proto, size, fitted) for x in group]
    scales = fitted.on_grid.scales if fitted is not None and fitted.on_grid is not None else None
    by_alpha: dict[float, tuple[Packed, tuple[onnx.TensorProto, ...]]] = {}
    for linear in group:
        if linear.alpha not in by_alpha:
            parts = pack(values.float() * linear.alpha, pattern, used, scales)
            stem = source.name if not by_alpha else f"{source.name}.{len(by_alpha)}"
            by_alpha[linear.alpha] = parts, tuple(packed.add(f"{stem}.{n}", t) for n, t in parts.tensors.items())
    if used.quantised:
        (alpha,) = by_alpha
        rounded = by_alpha[alpha][0].unpack() / alpha
    else:  # not unpacked, so that a mistake in packing shows
        rounded = values.to(used.dtype).to(values.dtype)
    proto = dense.add(source.value, rounded if source.rows_first else rounded.T)
    result = []
    for linear in group:
        parts, protos = by_alpha[linear.alpha]
        its = parts.op, used, parts.attributes, protos, proto, parts.nbytes, fitted
        result.append(Sparse(linear, name, sparsity, retained, *its))
    return result


def stored_as(
    weight: Shared,
    held: torch.dtype,
    nonzeros: int,
    pattern: Pattern,
    storage: Storage,
    *,
    sparse_ops: bool,
    worth: Worth | None,
) -> Storage | str:
    """How a weight with so many non-zeros is stored, or why it stays as it is.

    Args:
        weight: the weight and its linears.
        held: the type that the model holds it in.
        nonzeros: how many numbers are kept.
        pattern: of its zeros.
        storage: what was asked for.
        sparse_ops: whether it is packed at all.
        worth: asked whether it would be slower; None for never.
    """
    source = weight.linears[0].weight
    if not sparse_ops:
        return "--ops standard would write its quantised weight in float" if source.quantised else FP32
    used = _storage(held, [linear.alpha for linear in weight.linears], storage)
    if isinstance(used, str):
        return used
    rows, columns = source.shape
    size = packed_bytes(rows, columns, nonzeros, pattern, used)
    if size >= source.stored_bytes:
        wider = source.quantised and not storage.quantised
        advice = "; --dtype int8 or int4 stores it as the model does" if wider else ""
        return f"{LARGER} {size} bytes, now {source.stored_bytes}{advice}"
    slower = worth(pattern, rows, columns, nonzeros) if worth is not None else ""
    return slower or used


def _storage(held: torch.dtype, alphas: Sequence[float], wanted: Storage) -> Storage | str:
    """How to store a weight that the model holds as ``held`` and multiplies by ``alphas``; a reason if it cannot be."""
    if wanted.quantised:
        if len(set(alphas)) > 1:
            return f"the linears that share its weight scale it differently, which {wanted.kind} cannot store"
        return wanted if alphas[0] else "its factor is 0"
    if any(math.frexp(alpha)[0] != 0.5 for alpha in alphas):  # only scaling by a power of two rounds nothing
        return FP32
    return wanted if held is torch.float32 else Storage(FLOATS[held])


def _text(pattern: Pattern) -> str:
    return f"{pattern.sparsity:.1%} zeros" if isinstance(pattern, Unstructured) else str(pattern)
