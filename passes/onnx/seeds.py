"""Make the random ops of an ONNX model draw the same numbers in every session."""

import onnx
from onnx import helper

from .protos import graphs
from .view import STANDARD

RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")


def seed(proto: onnx.ModelProto) -> bool:
    """Give every random op of a model a seed of its own, by its place among them.

    Two models that differ in other nodes only draw the same. Without a seed ONNX Runtime draws by the number of the
    node, and no two runs can be compared.

    Args:
        proto: changed in place.

    Returns:
        Whether there is such an op.
    """
    bodies = [graph.node for graph in graphs(proto.graph)]
    bodies += [function.node for function in proto.functions if function.domain != "sparsify"]
    ops = [node for nodes in bodies for node in nodes if node.op_type in RANDOM and node.domain in STANDARD]
    for number, node in enumerate(ops):
        for index in reversed(range(len(node.attribute))):
            if node.attribute[index].name == "seed":
                del node.attribute[index]
        node.attribute.append(helper.make_attribute("seed", float(number + 1)))
    return bool(ops)
