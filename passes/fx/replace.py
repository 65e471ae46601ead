"""Replace a node of an exported program by another, add parameters for it, and drop those that nothing reads."""

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

from ..mapped import mapped


def replace_node(program: ExportedProgram, old: Node, new: Node) -> None:
    """Let ``new`` take the place of ``old``, also among the results that the signature names, and erase ``old``."""
    old.replace_all_uses_with(new)
    program.graph_signature.replace_all_uses(old.name, new.name)
    program.graph_module.graph.erase_node(old)


def place_beside(program: ExportedProgram, weight: Node, key: str, tensor: Tensor) -> Node:
    """The placeholder of a tensor that stands for ``weight`` or a part of it; who asks for the same key shares it."""
    graph = program.graph_module.graph
    specs = program.graph_signature.input_specs
    placeholders: list[Node] = [node for node in graph.nodes if node.op == "placeholder"]
    for spec, node in zip(specs, placeholders, strict=True):
        if spec.target == key:
            return node
    # Placeholders and specs correspond by position; right behind the dense weight is as good a place as any.
    index = placeholders.index(weight) + 1
    with graph.inserting_after(weight):
        holder: Node = graph.placeholder(f"{weight.name}_{key.rpartition('.')[2]}")
    holder.meta["val"] = weight.meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
    specs.insert(index, InputSpec(InputKind.BUFFER, TensorArgument(holder.name), key, persistent=True))
    program.state_dict[key] = mapped(tensor)
    return holder


def drop_unused(program: ExportedProgram) -> None:
    """Remove parameters that nothing reads any more, and their memory with them."""
    graph = program.graph_module.graph
    holders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    kept = []
    for spec in program.graph_signature.input_specs:
        holder = holders[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT or holder.users:
            kept.append(spec)
        else:
            graph.erase_node(holder)
    program.graph_signature.input_specs[:] = kept
    used = {spec.target for spec in kept}
    for key in [key for key in program.state_dict if key not in used]:
        del program.state_dict[key]
