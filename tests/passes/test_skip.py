"""What ``--skip`` means, by hand."""

import pytest
from sparsify_export.passes.skip import named_by


@pytest.mark.parametrize(
    ("glob", "path", "meant"),
    [
        ("layers.0.up", "layers.0.up", True),
        ("layers.*.up", "layers.11.up", True),
        ("layers.[01].up", "layers.1.up", True),
        ("layers.[01].up", "layers.2.up", False),
        ("a[b]c", "a[b]c", True),  # the name itself
        ("a[b]c", "abc", True),  # the set of characters
        ("a[[]b]*", "a[b]c", True),
        ("A[b]c", "a[b]c", False),
    ],
)
def test_a_path_is_meant_by_its_letters_or_by_a_glob(glob, path, meant):
    assert named_by(glob, path) is meant
