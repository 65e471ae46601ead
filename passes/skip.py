"""Which linears ``--skip`` means."""

import fnmatch


def named_by(glob: str, path: str) -> bool:
    """Whether ``glob`` is the path itself, letter by letter, or matches it as a glob.

    The first is for names with brackets, which a glob takes for a set of characters.
    """
    return glob == path or fnmatch.fnmatchcase(path, glob)
