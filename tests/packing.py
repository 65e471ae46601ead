"""Packing in plain torch and loops, apart from the compiled one, and a bare ONNX Runtime for one packed weight."""

import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from reference import nm_keep_mask
from sparsify_export.calibrate.patterns import NM, Pattern, Unstructured
from sparsify_export.passes.dialect.functions import with_shared
from sparsify_export.passes.dialect.packed import OPS, Packed
from sparsify_export.passes.dialect.storage import Storage

STORAGES = [Storage(), Storage("fp16"), Storage("bf16"), Storage("int8"), Storage("int4", 32), Storage("int4", 64)]
QUANTISED = [storage for storage in STORAGES if storage.quantised]
KINDS = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}


def sparse_nm(rows: int, groups: int, nm: NM, seed: int = 0, dead: float = 0.0) -> torch.Tensor:
    """A random N:M weight; the fraction ``dead`` of its kept places is zero as well."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * nm.m, generator=generator)
    keep = nm_keep_mask(weight.abs(), nm.n, nm.m)
    keep &= torch.rand(weight.shape, generator=generator) >= dead
    return torch.where(keep, weight, 0.0)


def scattered(rows: int, columns: int, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    """A random weight with zeros anywhere."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return torch.where(torch.rand(weight.shape, generator=generator) < density, weight, 0.0)


def quantise(
    weight: torch.Tensor, storage: Storage, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[N, K]`` and scales, as the files of the ops describe them."""
    rows, columns = weight.shape
    if storage.kind == "int8":
        scales = weight.abs().amax(dim=1) / 127 if scales is None else scales
        each = scales[:, None].expand(rows, columns)
    else:
        groups = -(-columns // storage.group)
        padded = torch.nn.functional.pad(weight, (0, groups * storage.group - columns))
        largest = padded.abs().reshape(rows, groups, storage.group).amax(dim=2)
        if scales is None:
            scales = (largest / 7).half()
            scales = torch.where((largest > 0) & (scales == 0), torch.tensor(2.0**-24).half(), scales)
        each = scales.float().repeat_interleave(storage.group, dim=1)[:, :columns]
    most = 127 if storage.kind == "int8" else 7
    codes = (weight / each).round().clamp(-most, most)
    return torch.where(each == 0, torch.zeros(()), codes).to(torch.int8), scales


def pairs(codes: list[int]) -> list[int]:
    """Two codes a byte."""
    halves = [code + 8 for code in codes]
    return [low | high << 4 for low, high in zip(halves[::2], [*halves[1::2], 0][: len(halves[::2])], strict=True)]


def slow_pack(weight: torch.Tensor, pattern: Pattern, storage: Storage) -> dict[str, torch.Tensor]:
    """The tensors of the op, one bit field at a time."""
    rows, columns = weight.shape
    nonzero = (weight != 0).float()
    keep = nm_keep_mask(nonzero, pattern.n, pattern.m) if isinstance(pattern, NM) else nonzero.bool()
    tensors = {}
    if storage.quantised:
        codes, tensors["scales"] = quantise(weight, storage)
    else:
        codes = weight.to(storage.dtype)
        codes = codes.masked_fill(codes == 0, 0.0)
    lines = [codes[row][keep[row]] for row in range(rows)]
    if storage.kind == "int4":
        width = columns if isinstance(pattern, NM) else 64
        lines = [
            torch.tensor(
                [
                    byte
                    for first in range(0, columns, max(width, 1))
                    for byte in pairs(codes[row, first : first + width][keep[row, first : first + width]].tolist())
                ],
                dtype=torch.uint8,
            )
            for row in range(rows)
        ]
    if isinstance(pattern, NM):
        tensors["values"] = torch.stack(lines)
        bits = 1 if pattern.m == 2 else 2 if pattern.m <= 4 else 4 if pattern.m <= 16 else 8
        packed = []
        for row in range(rows):
            places = [k % pattern.m for k in range(columns) if keep[row, k]]
            line = [0] * -(-len(places) * bits // 8)
            for i, place in enumerate(places):
                line[i * bits // 8] |= place << (i * bits % 8)
            packed.append(line)
        tensors["indices"] = torch.tensor(packed, dtype=torch.uint8)
        return tensors
    tensors["values"] = torch.cat(lines)
    tensors["row_start"] = torch.tensor([0, *[len(line) for line in lines]]).cumsum(0)
    masks = [
        [sum(int(b) << i for i, b in enumerate(keep[r, k : k + 8])) for k in range(0, columns, 8)] for r in range(rows)
    ]
    tensors["mask"] = torch.tensor(masks, dtype=torch.uint8)
    return tensors


def pattern_weight(pattern: Pattern, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A random weight of a pattern, with some of its kept places zero."""
    if isinstance(pattern, NM):
        return sparse_nm(rows, columns // pattern.m, pattern, seed, dead=0.1)
    assert isinstance(pattern, Unstructured)
    return scattered(rows, columns, 1 - pattern.sparsity, seed)


def onnx_tensor(name: str, tensor: torch.Tensor) -> onnx.TensorProto:
    """An initializer; numpy has no bfloat16."""
    if tensor.dtype in KINDS:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return helper.make_tensor(name, KINDS[tensor.dtype], tensor.shape, raw, raw=True)
    return numpy_helper.from_array(tensor.numpy(), name)


def bare_session(packed: Packed, bias: torch.Tensor | None, rank: int) -> ort.InferenceSession:
    """One node and its function body in a bare ONNX Runtime, nothing optimised away."""
    tensors = {**packed.tensors, **({} if bias is None else {"bias": bias})}
    graph = helper.make_graph(
        [helper.make_node(packed.op, ["x", *tensors], ["y"], domain="sparsify", **packed.attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [onnx_tensor(name, tensor) for name, tensor in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("sparsify", 1)]
    functions = with_shared([OPS[packed.op].FUNCTION])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def tokens(features: int, rank: int) -> torch.Tensor:
    """Random activations ``[..., features]`` of a rank."""
    return torch.randn((2, 3, features)[3 - rank :], generator=torch.Generator().manual_seed(9))
