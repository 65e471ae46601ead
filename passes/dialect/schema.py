"""The ONNX schema of an op: activations and stored weight in, activations out."""

from collections.abc import Mapping, Sequence

import onnx
from onnx.defs import OpSchema

FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def register(name: str, weight: Mapping[str, str | Sequence[str]], attributes: Sequence[str]) -> OpSchema:
    """Make the op known to ``onnx`` and to ``torch.onnx``.

    Args:
        name: of the op, in the domain ``sparsify``.
        weight: type of each stored tensor by its input name, or the types that it may have.
        attributes: names of the attributes, all integers.
    """
    formal = OpSchema.FormalParameter
    choices = {key: types for key, types in weight.items() if not isinstance(types, str)}
    stored = [formal(key, "T" if key in choices else str(types)) for key, types in weight.items()]
    schema = OpSchema(
        name,
        "sparsify",
        1,
        inputs=[
            formal("x", "tensor(float)"),
            *stored,
            formal("bias", "tensor(float)", param_option=OpSchema.FormalParameterOption.Optional),
        ],
        outputs=[formal("y", "tensor(float)")],
        type_constraints=[("T", list(types), "how values are stored") for types in choices.values()],
        attributes=[OpSchema.Attribute(key, OpSchema.AttrType.INT, "") for key in attributes],
    )
    onnx.defs.register_schema(schema)
    return schema


def register_experts(name: str, linear: OpSchema | None) -> OpSchema:
    """Make an op of ``experts.py`` known, which stores its weight as ``linear`` does, or dense where that is None.

    Its inputs are those of ``linear`` with ``ids`` behind x and a bias that is always there.
    """
    formal = OpSchema.FormalParameter
    stored = [formal("weight", "tensor(float)")]
    if linear is not None:
        stored = [formal(i.name, i.type_str) for i in linear.inputs if i.name not in ("x", "bias")]
    kept = [] if linear is None else linear.type_constraints
    attributes = [] if linear is None else [*linear.attributes, "experts"]
    schema = OpSchema(
        name,
        "sparsify",
        1,
        inputs=[
            formal("x", "tensor(float)"),
            formal("ids", "tensor(int64)"),
            *stored,
            formal("bias", "tensor(float)"),
        ],
        outputs=[formal("y", "tensor(float)")],
        type_constraints=[(c.type_param_str, list(c.allowed_type_strs), c.description) for c in kept],
        attributes=[OpSchema.Attribute(key, OpSchema.AttrType.INT, "") for key in attributes],
    )
    onnx.defs.register_schema(schema)
    return schema
