"""The locks hold what pyproject.toml asks for, with hashes, and name nobody's disk or package index."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
TORCH = Requirement(re.search(r"^TORCH\s*:= (.*)$", MAKEFILE, re.MULTILINE)[1])


def locked(name):
    """Every entry of a lock, without its hashes, and how many of them it has."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    entries = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return [(Requirement(entry.split(" --hash")[0]), entry.count("--hash=sha256:")) for entry in entries]


def wanted():
    project = PROJECT["project"]
    groups = [project["dependencies"], project["optional-dependencies"]["test"], PROJECT["dependency-groups"]["build"]]
    return [Requirement(text) for group in groups for text in group]


@pytest.mark.parametrize("name", ["requirements.lock", ".ci/oldest.lock"])
def test_every_dependency_is_locked_within_its_range_and_with_hashes(name):
    entries = locked(name)
    assert all(hashes > 0 and str(entry.specifier).startswith("==") for entry, hashes in entries)
    versions = [(canonicalize_name(e.name), str(e.specifier)[2:]) for e, _ in entries] + [
        ("torch", str(TORCH.specifier)[2:])
    ]
    for requirement in wanted():
        found = [version for package, version in versions if package == canonicalize_name(requirement.name)]
        assert found, f"{name} lacks {requirement.name}: make update"
        assert all(version in requirement.specifier for version in found), (
            f"{requirement}, {name} has {found}: make update"
        )


def test_the_lock_of_the_oldest_holds_the_lower_bounds():
    """A bound below what another dependency asks for would be a promise that nobody can try."""
    versions = {canonicalize_name(e.name): str(e.specifier)[2:] for e, _ in locked(".ci/oldest.lock")}
    for requirement in wanted():
        lower = [spec.version for spec in requirement.specifier if spec.operator == ">="]
        if requirement.name != "torch":
            assert lower, f"{requirement} has no lower bound: which one is the oldest that works?"
            assert versions[canonicalize_name(requirement.name)].startswith(lower[0]), requirement
    torch = next(r for r in wanted() if r.name == "torch")
    assert str(TORCH.specifier)[2:].startswith(next(s.version for s in torch.specifier if s.operator == ">="))


@pytest.mark.parametrize("name", ["requirements.lock", ".ci/oldest.lock", "Makefile", ".ci/run", "pyproject.toml"])
def test_no_index_and_no_path_of_a_machine_is_named(name):
    text = (ROOT / name).read_text()
    for word in ("index-url", "find-links", "file://", "/opt/", "/work/", "/tmp/"):
        assert word not in text


def test_a_lock_keeps_cuda_out():
    assert not [e.name for e, _ in locked("requirements.lock") if re.match(r"nvidia|cuda|triton$|torch", e.name)]
