"""The flags of a TensorRT engine: which there are, what they may be with, and what they mean for a model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from .calibrate.eight_bit import Kind
from .calibrate.patterns import NM
from .passes.errors import InputError
from .passes.frontend.load import Pretrained
from .passes.frontend.positions import longest
from .passes.onnx.plugin import LIBRARY
from .passes.recipe import Recipe
from .runtime.tensorrt.profiles import Sizes, choose_sizes, parse_range
from .runtime.tensorrt.session import is_plan

Ops: TypeAlias = Literal["sparse", "standard"]


@dataclass(frozen=True)
class EngineSettings:
    """What the flags of an engine say, as they were given.

    Attributes:
        batch: texts at once, ``min,opt,max``; None for one.
        sequence: tokens at once, ``min,opt,max``; None for any up to the context, or a quarter of it with a KV cache.
        context: tokens of a text at most; None for what the model takes, within reason.
        workspace_mib: memory that a tactic may use; None leaves it to TensorRT.
        level: 3 or 5, how long TensorRT looks for fast tactics; None for 3.
        ops: ``sparse`` to run 2:4 linears by our plugin too, ``standard`` for no plugin; None for a plugin where
            TensorRT has no kernel.
        codes: what the products of pruned linears are of; None for what everything else is computed in.
    """

    batch: str | None = None
    sequence: str | None = None
    context: int | None = None
    workspace_mib: int | None = None
    level: int | None = None
    ops: Ops | None = None
    codes: Kind | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "batch": self.batch,
            "seq": self.sequence,
            "context": self.context,
            "workspace_mib": self.workspace_mib,
            "level": self.level,
            **({"ops": self.ops} if self.ops else {}),
            **({"dtype": self.codes} if self.codes else {}),
        }


def check_engine_flags(
    model: str,
    out: str,
    engine: EngineSettings,
    *,
    dtype: str | None,
    quantise: str | None,
    refused: Mapping[str, object],
) -> EngineSettings | None:
    """The settings of the engine that ``out`` names, or None where it names none.

    Args:
        model: what to compile.
        out: where to.
        engine: what the flags of an engine say.
        dtype: what ``--dtype`` says.
        quantise: what ``--quantise`` says.
        refused: flags that an engine cannot have, with what they say; None for not given.

    Raises:
        InputError: a flag has no effect here, or an engine cannot be had like this.
    """
    given = {"--batch": engine.batch, "--seq": engine.sequence, "--context": engine.context}
    given |= {"--workspace": engine.workspace_mib, "--level": engine.level}
    if not is_plan(Path(out)):
        if ignored := [flag for flag, value in given.items() if value is not None]:
            raise InputError(f"{ignored[0]} has no effect without an engine; want an output ending in .plan")
        if dtype == "fp8":
            raise InputError("--dtype fp8 is for engines; want an output ending in .plan")
        return None
    if model.endswith(".onnx"):
        raise InputError(f"{model} cannot become an engine; give the pretrained model it was exported from")
    for flag, value in refused.items():
        if value is not None:
            raise InputError(f"{flag} {value} has no effect on an engine")
    codes: Kind | None = next((kind for kind in get_args(Kind) if kind == dtype), None)
    if codes is None and dtype not in (None, "fp32", "fp16", "bf16"):
        raise InputError(f"--dtype {dtype} cannot be had in an engine; want fp16, bf16, fp32, int8 or fp8")
    if quantise is not None and codes != "int8":
        why = "with --dtype fp8, which rounds to nearest" if codes else "on an engine without --dtype int8"
        raise InputError(f"--quantise {quantise} has no effect {why}")
    for flag, text in (("--batch", engine.batch), ("--seq", engine.sequence)):
        if text is not None:
            parse_range(flag, text)
    if codes is not None and engine.ops == "sparse":
        raise InputError(f"--ops sparse cannot be had with --dtype {codes}: the plugins take fp16, bf16 or fp32")
    return replace(engine, codes=codes)


def check_codes(codes: Kind | None, recipe: Recipe | None) -> None:
    """Refuse 8-bit codes where no linear of an engine will have them.

    Args:
        codes: what ``--dtype`` asks for.
        recipe: how the model is pruned.

    Raises:
        InputError: nothing is pruned, or not to a pattern.
    """
    if codes is None:
        return
    if recipe is None:
        raise InputError(f"--dtype {codes} of an engine is for the linears that are pruned; give --nm, e.g. 2:4")
    if not isinstance(recipe.pattern, NM):
        raise InputError(f"--dtype {codes} cannot be had with zeros anywhere: their plugin takes fp16; want --nm")


def engine_sizes(engine: EngineSettings, pretrained: Pretrained) -> Sizes:
    """What the engine of this model has to take.

    Raises:
        InputError: the model does not take that, takes text and more, or takes no text and ``--seq`` or ``--context``
            is given.
    """
    is_text = pretrained.inputs[0] == "input_ids"
    if is_text and not pretrained.takes_text_alone:
        raise InputError(f"{pretrained.source} takes {', '.join(pretrained.inputs)}; an engine takes one kind of input")
    if not is_text and (engine.sequence or engine.context):
        flag = "--seq" if engine.sequence else "--context"
        raise InputError(f"{flag} has no effect: {pretrained.source} does not take text")
    limit = longest(pretrained.model) if is_text else None
    cached = pretrained.kind == "causal"
    return choose_sizes(engine.batch, engine.sequence, engine.context, longest=limit, cached=cached)


def not_built(out: Path, engine: Mapping[str, Any]) -> str:
    """The sentence that says why there is no engine, and how to get one."""
    why = str(engine["not_built"]).removesuffix(".")
    plugins = f", {LIBRARY}" if any(linear["plugin"] for linear in engine["linears"]) else ""
    return (
        f"{out} was not built: {why}; {engine['onnx']} and build_plan.py are in place, and `python build_plan.py "
        f"{engine['options']}` builds it with TensorRT 10.15 or newer{plugins} and an NVIDIA GPU"
    )
