"""Put one node in the place of another in an exported program."""

from torch.export import ExportedProgram
from torch.fx import Node


def replace_node(program: ExportedProgram, old: Node, new: Node) -> None:
    """Let ``new`` take the place of ``old``, also among the results that the signature names, and erase ``old``."""
    old.replace_all_uses_with(new)
    program.graph_signature.replace_all_uses(old.name, new.name)
    program.graph_module.graph.erase_node(old)
