"""What lies beside a model in a folder for other tools to read: configurations, tokenizer, how sentences are pooled."""

import copy
import json
import shutil
from pathlib import Path, PurePosixPath

from .passes.errors import InputError
from .passes.frontend.load import Pretrained

SENTENCES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
PARTS = (".json", ".safetensors")


def write_configuration(pretrained: Pretrained, folder: Path) -> None:
    """Write ``config.json`` and what else of the source serving needs into ``folder``.

    The configuration names the class of the model, which a GGUF file does not, and no quantisation: what the source
    was stored in is not what the weights beside it are.
    """
    config = copy.deepcopy(pretrained.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(pretrained.model).__name__]
    config.save_pretrained(folder)
    if pretrained.kind == "causal" and pretrained.model.generation_config is not None:
        # Not save_pretrained, which some versions let fail on what was published.
        pretrained.model.generation_config.to_json_file(folder / "generation_config.json")
    if pretrained.tokenizer is not None:
        pretrained.tokenizer.save_pretrained(folder)
    if (Path(pretrained.source) / SENTENCES[0]).is_file():
        _copy_sentence_modules(Path(pretrained.source), folder)


def _copy_sentence_modules(source: Path, folder: Path) -> None:
    """The files of a sentence-transformers folder that say what follows the model: pooling, dense layers, norms.

    Raises:
        InputError: ``modules.json`` is damaged or names a folder elsewhere.
    """
    try:
        paths = [str(module["path"]) for module in json.loads((source / SENTENCES[0]).read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{source / SENTENCES[0]} is not the list of modules that it should be: {error}") from error
    if outside := [path for path in paths if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts]:
        raise InputError(f"{source / SENTENCES[0]} names {outside[0]!r}; want folders inside {source}")
    for name in SENTENCES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for path in filter(None, paths):  # the model itself is the one without a folder of its own
        (folder / path).mkdir(parents=True, exist_ok=True)
        for file in sorted((source / path).glob("*")):  # packages and git leave empty folders out
            if file.is_file() and file.suffix in PARTS:
                shutil.copyfile(file, folder / path / file.name)
