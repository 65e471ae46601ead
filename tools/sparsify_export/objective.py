"""What of a model's output counts: decided by what it returns, its configuration, and what its folder says follows."""

from pathlib import Path

from .passes.frontend.load import Pretrained
from .passes.frontend.trace import Traced
from .passes.outputs import Output, Pooled
from .runtime.embedding import pooling_of


def output_of(traced: Traced, pretrained: Pretrained) -> Output:
    """What the model returns first, and so what it is distilled by.

    Of a decoder logits of the next token; of a classifier logits of classes, or of labels where its configuration says
    that several may be right; of a reranker or another model with one number as its logits that number; of a folder
    that sentence-transformers reads embeddings, pooled and normalised as it says; else values, such as the last hidden
    state.

    Raises:
        InputError: what the folder says of pooling cannot be read, or is not known.
    """
    if traced.kind == "causal":
        return "logits"
    config = pretrained.model.config
    if traced.outputs[0] == "logits":
        if config.problem_type == "multi_label_classification":
            return "labels"
        return "values" if _numbers(traced) == 1 or config.problem_type == "regression" else "classes"
    folder = Path(pretrained.source)
    if traced.outputs[0] == "last_hidden_state" and (folder / "modules.json").is_file():
        pooling = pooling_of(folder)
        return Pooled(pooling.mode, pooling.normalise)
    return "values"


def _numbers(traced: Traced) -> int:
    """How many numbers the first output has for each token or sample."""
    (returned,) = (node for node in traced.program.graph.nodes if node.op == "output")
    return int(returned.args[0][0].meta["val"].shape[-1])
