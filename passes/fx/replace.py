"""Replace one node of an exported program by another, and drop the parameters that nothing reads any more."""

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node


def replace_node(program: ExportedProgram, old: Node, new: Node) -> None:
    """Let ``new`` take the place of ``old``, also among the results that the signature names, and erase ``old``."""
    old.replace_all_uses_with(new)
    program.graph_signature.replace_all_uses(old.name, new.name)
    program.graph_module.graph.erase_node(old)


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
