"""Imports run one way: tools -> runtime -> passes -> calibrate; the compiled modules are leaves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "calibrate": {"calibrate", "_native", "_cuda"},
    "passes": {"passes", "calibrate", "_native", "_cuda"},
    "runtime": {"runtime", "passes", "calibrate", "_native", "_cuda"},
}


def imported_folders(file: Path, folder: str) -> set[str]:
    """Top-level parts of the package that a file imports, relative imports resolved."""
    package = ("sparsify_export", folder, *file.relative_to(ROOT / folder).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*name, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "sparsify_export" and len(name) > 1}
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folder_imports_only_what_is_below_it(folder):
    for file in sorted((ROOT / folder).rglob("*.py")):
        assert imported_folders(file, folder) <= MAY_IMPORT[folder], file


def test_the_check_itself_sees_a_wrong_import(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "calibrate").mkdir()
    wrong = tmp_path / "calibrate" / "wrong.py"
    wrong.write_text("from ..passes import pipeline\n")
    assert imported_folders(wrong, "calibrate") == {"passes"}
