"""A checksum of every packed weight in the metadata of its ONNX file: written with the file, compared with its data.

The digest of a linear is BLAKE2b (RFC 7693) of 16 bytes over the stored bytes of its tensors in the order of the op's
inputs: values, indices or mask, row_start, scales. The entry ``sparsify.checksums`` is JSON, ``{output: hex digest}``
by the name of the node's output, which ONNX keeps unique where names of nodes may be empty.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from ..dialect.experts import PREFIX, stored_by
from ..dialect.packed import TENSORS
from ..errors import InputError
from .protos import data_files, graphs, opened, remove

KEY = "sparsify.checksums"
SIZE = 16


@dataclass(frozen=True)
class Checked:
    """What was compared: ``linears`` and the ``nbytes`` of their packed tensors."""

    linears: int
    nbytes: int


def add_checksums(proto: onnx.ModelProto, folder: Path) -> None:
    """Put the checksums into the metadata in place of older ones; a model without sparse ops gets none.

    Args:
        proto: the model; its data is read back from ``folder``, one tensor at a time.
        folder: what its external data is relative to.
    """
    digests = {node.output[0]: _digest(tensors, folder)[0] for node, tensors in _sparse(proto)}
    remove(proto.metadata_props, lambda entry: entry.key == KEY)
    if digests:
        proto.metadata_props.add(key=KEY, value=json.dumps(digests))


def verify_checksums(path: Path) -> Checked:
    """Compute the checksums of a file again from the data on disk.

    Raises:
        InputError: one differs (all of those are named), the file has none, or the entry is not what we write.
    """
    data_files(path)  # refuses what would be waited for, or lies elsewhere
    proto = onnx.load(str(path), load_external_data=False)
    wanted = _read(proto, path)
    size, found, wrong = 0, set(), []
    for node, tensors in _sparse(proto):
        name, output = node.name or node.output[0], node.output[0]
        found.add(output)
        if output not in wanted:
            raise InputError(f"{path}: {name} has no checksum; the file was changed by another tool")
        try:
            digest, nbytes = _digest(tensors, path.parent)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"{path}: the weight of {name} cannot be read: {error or type(error).__name__}") from error
        size += nbytes
        if digest != wanted[output]:
            wrong.append(name)
    if missing := wanted.keys() - found:
        raise InputError(f"{path}: there is a checksum for {min(missing)!r}, which is no sparse linear of the file")
    if wrong:
        raise InputError(f"{path}: the data of {', '.join(wrong)} is not what was written; the file is damaged")
    return Checked(len(found), size)


def _sparse(proto: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, list[onnx.TensorProto]]]:
    """Every sparse op whose weight is stored, with its tensors in the order of the inputs."""
    scopes = list(graphs(proto.graph))
    stored = {tensor.name: tensor for graph in scopes for tensor in graph.initializer}
    for graph in scopes:
        for node in graph.node:
            if node.domain == "sparsify" and node.op_type.removeprefix(PREFIX) in TENSORS and node.output:
                stores, first = stored_by(node.op_type)
                names = node.input[first : first + len(stores)]
                if names and all(name in stored for name in names):
                    yield node, [stored[name] for name in names]


def _digest(tensors: list[onnx.TensorProto], folder: Path) -> tuple[str, int]:
    """Hex digest of the bytes of some tensors, and how many bytes that are."""
    digest, size = hashlib.blake2b(digest_size=SIZE), 0
    for tensor in tensors:
        raw = opened(tensor, folder).tobytes()
        digest.update(raw)
        size += len(raw)
    return digest.hexdigest(), size


def _read(proto: onnx.ModelProto, path: Path) -> dict[str, str]:
    text = next((entry.value for entry in proto.metadata_props if entry.key == KEY), None)
    if text is None:
        raise InputError(f"{path} has no checksums: it holds no sparse linear, or was written before there were any")
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the metadata {KEY} is not JSON") from error
    if not isinstance(read, dict) or not all(isinstance(value, str) for value in read.values()):
        raise InputError(f"{path}: the metadata {KEY} is not a table of names and digests")
    return read
