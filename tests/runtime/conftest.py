"""A causal language model small enough to write down, as an ONNX file and as a torch module."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from sparsify_export.calibrate.masks import nm_keep_mask
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_bitmask, linear_nm
from sparsify_export.passes.dialect.functions import with_shared
from torch import nn

VOCABULARY, WIDTH = 23, 8

TEXT = """
<ir_version: 10, opset_import: ["" : 23, "sparsify" : 1]>
tiny (int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
      float[batch, 1, past, 8] past_key_values_0_key, float[batch, 1, past, 8] past_key_values_0_value)
  => (float[batch, sequence, 23] logits, float[batch, 1, total, 8] present_0_key,
      float[batch, 1, total, 8] present_0_value)
<int64 zero = {0}, int64 one = {1}, int64[1] axis0 = {0}, int64[1] axis1 = {1}, int64[2] axes12 = {1, 2}>
{
    x = Gather (embed, input_ids)
    h = sparsify.linear_nm <n = 2, m = 4> (x, q_values, q_indices, q_bias)
    q = Unsqueeze (h, axis1)
    k = Unsqueeze (x, axis1)
    total1 = Shape <start = 1, end = 2> (attention_mask)
    total0 = Squeeze (total1)
    new = Shape <start = 1, end = 2> (input_ids)
    first = Sub (total1, new)
    columns = Range (zero, total0, one)
    rows = Slice (columns, first, total1)
    column = Unsqueeze (columns, axis0)
    row = Unsqueeze (rows, axis1)
    causal = LessOrEqual (column, row)
    real = Cast <to = 9> (attention_mask)
    seen = Unsqueeze (real, axes12)
    mask = And (causal, seen)
    a, present_0_key, present_0_value = Attention (q, k, k, mask, past_key_values_0_key, past_key_values_0_value)
    a2 = Squeeze (a, axis1)
    y = sparsify.linear_bitmask <in_features = 8> (a2, o_values, o_mask, o_start)
    z = Add (x, y)
    g = MatMul (z, up)
    head = Transpose <perm = [1, 0]> (embed)
    logits = MatMul (g, head)
}
"""


class Tiny(nn.Module):
    """The same in torch, called like a transformers model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        q, o = torch.randn(2, WIDTH, WIDTH)
        weights = {
            "embed": torch.randn(VOCABULARY, WIDTH),
            "q": torch.where(nm_keep_mask(q.abs(), NM(2, 4)), q, 0.0),
            "q_bias": torch.randn(WIDTH),
            "o": torch.where(torch.rand(WIDTH, WIDTH) > 0.5, o, 0.0),
            "up": torch.randn(WIDTH, WIDTH),  # [in, out]
        }
        for name, weight in weights.items():
            self.register_buffer(name, weight)

    def forward(self, input_ids, use_cache=False):
        x = self.embed[input_ids]
        q = x @ self.q.T + self.q_bias
        a = nn.functional.scaled_dot_product_attention(q[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]
        return SimpleNamespace(logits=(x + a @ self.o.T) @ self.up @ self.embed.T)


@dataclass(frozen=True)
class Sample:
    path: Path
    model: Tiny


def _write(model: Tiny, path: Path) -> None:
    proto = onnx.parser.parse_model(TEXT)
    values, indices = linear_nm.pack(model.q, NM(2, 4), torch.float32)
    kept, mask, start = linear_bitmask.pack(model.o, torch.float32)
    weights = {
        "embed": model.embed, "up": model.up, "q_values": values, "q_indices": indices, "q_bias": model.q_bias,
        "o_values": kept, "o_mask": mask, "o_start": start,
    }  # fmt: skip
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(w.numpy(), name) for name, w in weights.items())
    proto.functions.extend(with_shared([linear_nm.FUNCTION, linear_bitmask.FUNCTION]))
    names = {f"{a}_0_{b}": f"{a}.0.{b}" for a in ("past_key_values", "present") for b in ("key", "value")}
    for value in (*proto.graph.input, *proto.graph.output):
        value.name = names.get(value.name, value.name)
    for node in proto.graph.node:
        node.name = {"h": "layers.0.q", "y": "layers.0.o", "g": "layers.0.up", "logits": "lm_head"}.get(
            node.output[0], ""
        )
        for fields in (node.input, node.output):
            fields[:] = [names.get(name, name) for name in fields]
    onnx.checker.check_model(proto)
    onnx.save(proto, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=200)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """``tiny.path``: an ONNX file with external data; ``tiny.model``: the same model in torch."""
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    model = Tiny()
    _write(model, path)
    return Sample(path, model)


@pytest.fixture
def onnx_file(tmp_path):
    """``onnx_file(text, **weights)`` writes a model given as ONNX text."""

    def write(text, **weights):
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items())
        path = tmp_path / "other.onnx"
        onnx.save(proto, path)
        return path

    return write
