"""A pruned model as a plain checkpoint, for whatever reads those of transformers: ``--also-checkpoint``."""

import copy
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig

from .model_folder import write_configuration
from .passes.errors import InputError
from .passes.frontend.load import Pretrained
from .passes.mapped import mapped
from .publish import PARTIAL, locked, open_stage, publish_folder, recover

SHARD = "5GB"
"""Bytes of a file of weights at most, as transformers reads it."""
IMAGES = "preprocessor_config.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MARK = "report.json"
"""What says that a folder is ours to remove; this one holds none, so it never is."""


@dataclass(frozen=True)
class DenseCheckpoint:
    """Where the checkpoint goes: written beside its place, and moved there when the model is verified.

    Attributes:
        folder: its place, where nothing is yet.
        dtype: of its weights, ``fp32`` or ``bf16``.
        stage: the folder that it is written in, this run's own.
    """

    folder: Path
    dtype: Literal["fp32", "bf16"]
    stage: Path
    _locks: list[int] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def check(
        cls, folder: Path, dtype: Literal["fp32", "bf16"], out: Path, inputs: Iterable[Path] = ()
    ) -> "DenseCheckpoint":
        """Refuse what cannot be written before any work is done.

        Args:
            folder: where to.
            dtype: of the weights.
            out: what else is written, a file or a folder.
            inputs: files and folders that are read or kept, which the checkpoint must not be.

        Raises:
            InputError: something is there already, the parent is no folder that can be written to, or it is what else
                is read or written, or inside that.
        """
        checkpoint = cls(folder, dtype, folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{PARTIAL}"))
        flag = f"--also-checkpoint {folder}"
        if not folder.parent.is_dir() or not os.access(folder.parent, os.W_OK):
            raise InputError(f"{flag} cannot be written: {folder.parent} is not a folder that can be written to")
        for other in (out, *inputs):
            if other.resolve() in (folder.resolve(), *folder.resolve().parents) or folder.resolve() in (
                other.resolve().parents
            ):
                raise InputError(f"{flag} and {other} would lie in one another; give another folder")
        try:
            recover(folder, MARK)
        except OSError as error:
            raise InputError(f"cannot clear what an earlier run left beside {folder}: {error}") from error
        checkpoint._refuse_taken()
        return checkpoint

    def write(self, pretrained: Pretrained) -> None:
        """Write the model, with the weights that it holds now, beside its place.

        Raises:
            InputError: the disk is full, or transformers cannot write this model.
        """
        try:
            self._locks.append(open_stage(self.stage))
            write_checkpoint(pretrained, self.stage, DTYPES[self.dtype])
        except OSError as error:
            raise InputError(f"--also-checkpoint {self.folder} cannot be written: {error.strerror}") from error

    def publish(self) -> None:
        """Move what was written into place.

        Raises:
            InputError: something came to be there while this run was under way.
        """
        with locked(self.folder.parent):
            self._refuse_taken()
            publish_folder(self.stage, self.folder, MARK)

    def clear(self) -> None:
        """Remove what was not moved."""
        shutil.rmtree(self.stage, ignore_errors=True)
        while self._locks:
            os.close(self._locks.pop())

    def _refuse_taken(self) -> None:
        if os.path.lexists(self.folder):
            raise InputError(f"--also-checkpoint {self.folder} exists already; give a folder that does not")


def write_checkpoint(pretrained: Pretrained, folder: Path, dtype: torch.dtype) -> None:
    """Write a model as transformers does: safetensors, in shards where it is large, configurations and tokenizer.

    Nothing in it says that weights were pruned or how the source was quantised: programs that look for such entries
    want packed weights then, or refuse. The model is left as it is.

    Raises:
        InputError: transformers cannot write this model.
    """
    # Not the model itself: saving writes the dtype into its configuration, quantisers of the source bring their own
    # weights, and a generation config that contradicts itself, as some were published, cannot be saved.
    model = copy.copy(pretrained.model)
    model.config = copy.deepcopy(model.config)
    vars(model).pop("hf_quantizer", None)
    for name in ("quantization_config", "compression_config", "sparsity_config"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    if model.can_generate():
        model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=_cast(model, dtype), max_shard_size=SHARD)
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"transformers cannot write a checkpoint of {pretrained.source}: {error}") from error
    model.config.dtype = dtype
    model.generation_config = pretrained.model.generation_config
    write_configuration(replace(pretrained, model=model), folder)
    for file in folder.glob("*.safetensors"):  # which safetensors writes for its owner only
        file.chmod((folder / "config.json").stat().st_mode)
    if (Path(pretrained.source) / IMAGES).is_file():
        shutil.copyfile(Path(pretrained.source) / IMAGES, folder / IMAGES)


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in another type; those that are one stay one, which is how tied weights are known."""
    made: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    state = {}
    for name, value in model.state_dict().items():
        key = (value.data_ptr(), value.shape, value.stride())
        if key not in made:
            made[key] = mapped(value.to(dtype)) if value.is_floating_point() else value
        state[name] = made[key]
    return state
