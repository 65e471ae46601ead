"""Write the linears that stay dense as plain matrix products, the form every runtime has its fastest kernel for."""

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from ..mapped import mapped
from .canonical import parameter_names
from .replace import replace_node

aten = torch.ops.aten


def plain_linears(program: ExportedProgram) -> None:
    """Turn ``linear`` into ``matmul`` and ``add``, with the weight stored as ``matmul`` reads it, in place.

    Before:  y = linear(x, W, b)        W [out, in]
    After:   y = matmul(x, V) + b       V = W^T, [in, out], contiguous, under W's name in the state_dict
    Left alone: weights that something else reads as well (tied embeddings): a second copy would cost more than the
        transposition that the runtime makes once while loading.
    Numerics: the same products in the same order; a bias is added after the sum instead of before.
    """
    names = parameter_names(program)
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.linear.default:
            continue
        x, weight, *bias = node.args
        assert isinstance(weight, Node)
        key = names.get(weight.name, "")
        if key not in program.state_dict or len(weight.users) != 1:
            continue
        program.state_dict[key] = torch.nn.Parameter(mapped(program.state_dict[key].t()), False)
        weight.meta["val"] = weight.meta["val"].t().contiguous()
        with graph.inserting_before(node):
            product = graph.call_function(aten.matmul.default, (x, weight))
            product.meta = dict(node.meta)
            result = product
            if bias:
                result = graph.call_function(aten.add.Tensor, (product, bias[0]))
                result.meta = dict(node.meta)
        replace_node(program, node, result)
    program.graph_module.recompile()
