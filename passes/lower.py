"""Lower a traced model to ONNX, opset 23, for ONNX Runtime or for TensorRT."""

import ast
import itertools
import json
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from onnx import FunctionProto
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import onnx_fusions
from torch.export import ExportedProgram

from .dialect import experts, linear_codes
from .dialect.functions import with_shared
from .dialect.packed import OPS
from .errors import InputError
from .frontend.trace import PREFIX, Traced
from .fx.canonical import parameter_names
from .fx.experts import join_dense
from .fx.merge import merge_linears
from .fx.plain import plain_linears
from .onnx.attention_cache import JoinCacheInAttention
from .onnx.attention_heads import SplitHeadsInAttention
from .onnx.cache_in_place import KeepCacheInPlace
from .onnx.grouped_attention import ShareAttentionHeads
from .onnx.plugin import SuitPlugin
from .onnx.qdq import Codes, QuantiseLinears, joined
from .onnx.spread import SpreadMasks, SpreadRotaryTables
from .onnx.tensorrt import SuitTensorRT, check_tensorrt
from .onnx.write import write_model

OPSET = 23
TRANSLATION: dict[Callable[..., Any], Callable[..., Any]] = {
    **{getattr(torch.ops.sparsify, name).default: op.to_onnx for name, op in OPS.items()},
    **{getattr(torch.ops.sparsify, name).default: op.to_onnx for name, op in experts.OPS.items()},
    torch.ops.sparsify.experts.default: experts.DENSE_OP.to_onnx,
    torch.ops.sparsify.linear_codes.default: linear_codes.to_onnx,
}


def to_onnx(
    traced: Traced,
    path: Path,
    *,
    metadata: Mapping[str, object],
    tensorrt: bool = False,
    in_place: bool = False,
    quantised: Mapping[str, Codes] = MappingProxyType({}),
) -> None:
    """Write ``traced`` as ``path`` and ``path.data``.

    Causal models take ``input_ids, attention_mask, past_key_values.{i}.key/value`` and return ``logits,
    present.{i}.key/value``; other models keep the names of their inputs and outputs. Sparse ops are custom ops of the
    domain ``sparsify`` and, for runtimes without our library, functions of standard ops in the same file.

    Args:
        traced: the model; its program is consumed.
        path: the ``.onnx`` file.
        metadata: stored in the file as JSON strings.
        tensorrt: write what TensorRT's parser takes. It refuses Attention that joins the KV cache itself, so Concat
            joins it; and of our ops only 2:4 and the bitmask of float weights have plugins, so it may hold no others.
            The file has no functions: one of its name would be taken for the plugin.
        in_place: keep the KV cache of a decoder in place, which is an op of ONNX Runtime's own; see `KeepCacheInPlace`.
        quantised: by the key of their weight, the plain products that TensorRT is to make of 8-bit codes.

    Raises:
        InputError: the files cannot be written, TensorRT would not take the model, or its cache cannot stay in place.
    """
    join_dense(traced.program, parameter_names(traced.program))
    merged = merge_linears(traced.program, apart=quantised)
    plain_linears(traced.program)
    model = _export(traced.program)
    _name(model, traced)
    _name_nodes(model)
    for pass_ in (
        common.ClearMetadataAndDocStringPass(),
        SpreadRotaryTables(),
        SpreadMasks(),
        ShareAttentionHeads(),
        common.RemoveUnusedNodesPass(),  # or the repetition would still read the keys
        *((SuitTensorRT(),) if tensorrt else (JoinCacheInAttention(), SplitHeadsInAttention())),
        *((KeepCacheInPlace(),) if in_place else ()),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        *((SuitPlugin(), QuantiseLinears(joined(quantised, merged))) if tensorrt else ()),
        common.RemoveUnusedNodesPass(),
    ):
        pass_(model)
    if tensorrt:
        check_tensorrt(model)
    model.metadata_props.update({f"sparsify.{key}": json.dumps(value) for key, value in metadata.items()})
    model.producer_name = "sparsify-export"
    used = set() if tensorrt else {node.op_type for node in model.graph if node.domain == "sparsify"}
    write_model(model, path, _functions(sorted(used)))


def _functions(used: Iterable[str]) -> list[FunctionProto]:
    """The bodies of ops by name, and of the ops that those of experts call for each of them."""
    found = {}
    for name in used:
        op = experts.DENSE_OP if name == experts.DENSE else experts.OPS.get(name)
        found[name] = OPS[name].FUNCTION if op is None else op.FUNCTION
        if op is not None and op.LINEAR:
            found[op.LINEAR] = OPS[op.LINEAR].FUNCTION
    return with_shared(found.values())


def _export(program: ExportedProgram) -> ir.Model:
    """Translate to ONNX and fold what is constant; norms and rotary embeddings become single ops."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it lists every torchvision op that is not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch's own tree utilities
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                custom_translation_table=TRANSLATION,
            )
    except torch.onnx.OnnxExporterError as error:
        said = str(error.__cause__ or error).strip().splitlines()[0]
        found = re.search(r"aten\.[\w.]+|aten::[\w.]+", said)
        why = f"there is no ONNX form for {found[0]} as it is called here" if found else said
        raise InputError(f"the model cannot be written as ONNX: {why}") from error
    finally:
        log.setLevel(level)
    assert exported is not None  # only with an ``f`` to write to would there be nothing to return
    model: ir.Model = exported.model
    common.InlinePass()(model)
    fold_constants_ir(model)
    onnx_fusions.fuse(model)
    return model


def _name_nodes(model: ir.Model) -> None:
    """Name products after their modules; where several have the same one, all but the first are numbered.

    ONNX Runtime refuses a file in which two nodes share a name, and a module may run more than once (ALBERT's layers)
    or hold several products.
    """
    taken = {node.name for node in model.graph if not _module(node)}
    for node in model.graph:
        path = _module(node)
        if path:
            numbered = (f"{path}#{i}" for i in itertools.count(2))
            node.name = path if path not in taken else next(name for name in numbered if name not in taken)
            taken.add(node.name)


def _module(node: ir.Node) -> str:
    """The module path of a linear, so that the file says which layer each weight belongs to; "" for other nodes."""
    if node.domain != "sparsify" and node.op_type not in ("MatMul", linear_codes.NODE):
        return ""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return scopes[-2].removeprefix(PREFIX) if len(scopes) > 1 else ""


def _name(model: ir.Model, traced: Traced) -> None:
    """Give inputs, outputs and their axes the names that runtimes look for."""
    axes: dict[str, str] = {}
    for value, name in zip(model.graph.inputs, traced.inputs, strict=True):
        value.name = name
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                axes.setdefault(dim.value, _axis_name(name, axis, traced.open_axis, axes.values()))
    for value, name in zip(model.graph.outputs, traced.outputs, strict=True):
        value.name = name
    computed = "total_sequence_length" if traced.open_axis is None else "output_length"
    for value in (*model.graph.inputs, *model.graph.outputs):
        dims: Sequence[int | ir.SymbolicDim] = list(value.shape or ())
        named = [axes.get(d.value or "", computed) if isinstance(d, ir.SymbolicDim) else d for d in dims]
        value.shape = ir.Shape(named)


def _axis_name(name: str, axis: int, opened: int | None, taken: Collection[str]) -> str:
    if axis == 0:
        return f"{name}_batch_size" if "batch_size" in taken else "batch_size"
    if axis == opened:
        return "length"
    if name == "attention_mask" or name not in ("input_ids", "token_type_ids"):
        return "past_sequence_length" if name.startswith("past_key_values") else "total_sequence_length"
    return "sequence_length"
