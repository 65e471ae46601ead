"""Private names of other packages, which a release may take away: those that are used are listed in CONTRIBUTING."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHIPPED = [path for folder in ("calibrate", "passes", "runtime", "tools") for path in (ROOT / folder).rglob("*.py")]


def private(tree, own):
    """``torch._ops`` and the like: names that begin with one underscore, behind a dot, and not defined by us."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name, base = node.attr, node.value
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module and "._" in node.module:
            name, base = node.module.split(".")[-1], None
        else:
            continue
        if not name.startswith("_") or name.startswith("__") or name in own:
            continue
        if not (isinstance(base, ast.Name) and base.id in ("self", "cls")):
            yield name


def test_private_names_are_those_that_contributing_lists():
    trees = {path: ast.parse(path.read_text()) for path in SHIPPED}
    own = {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    used = {name for tree in trees.values() for name in private(tree, own)} - {"_native", "_cuda"}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## What we use of others") : text.index("## Style")]
    listed = set(re.findall(r"[.`](_[a-zA-Z]\w*)", section))
    assert used == listed
