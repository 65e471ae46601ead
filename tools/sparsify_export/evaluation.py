"""What ``--eval`` asks for: perplexity and exact answers, before and after."""

from pathlib import Path

from .passes.errors import InputError
from .passes.frontend.batches import read_windows
from .passes.frontend.load import Pretrained
from .passes.frontend.positions import longest
from .runtime.evaluate import Logits, Perplexity, onnx_logits, perplexity, torch_logits
from .runtime.exact import ExactAnswers, exact_answers
from .runtime.session import CausalSession, open_session
from .settings import Console, Settings
from .stages import Stages


def evaluate_torch(
    pretrained: Pretrained, settings: Settings, stages: Stages, console: Console
) -> tuple[Perplexity, ExactAnswers] | None:
    """Perplexity and exact answers of the dense model, or None without ``--eval``.

    Raises:
        InputError: the model is no language model with a tokenizer.
    """
    if settings.evaluate is None:
        return None
    if pretrained.kind != "causal" or pretrained.tokenizer is None:
        raise InputError(f"{pretrained.source} is not a language model with a tokenizer, so --eval has no meaning")
    with stages.run("evaluate dense"):
        console.progress("evaluating the dense model", 0, 0)
        return _evaluate(torch_logits(pretrained.model), pretrained, settings, console)


def evaluate_onnx(
    pretrained: Pretrained, model: Path, settings: Settings, stages: Stages, console: Console
) -> tuple[Perplexity, ExactAnswers] | None:
    """Perplexity and exact answers of a finished file, or None without ``--eval``."""
    if settings.evaluate is None:
        return None
    with stages.run("evaluate result"):
        console.progress("evaluating the result", 0, 0)
        return _evaluate(onnx_logits(CausalSession(open_session(model))), pretrained, settings, console)


def perplexity_of(logits: Logits, pretrained: Pretrained, settings: Settings, console: Console) -> Perplexity:
    """Perplexity on the text of ``--eval``, of whatever gives the logits."""
    assert settings.evaluate is not None
    limit = longest(pretrained.model)
    length = min(settings.window, limit or settings.window)
    windows = read_windows(
        settings.evaluate, pretrained.tokenizer, samples=settings.windows, length=length, bos=settings.bos
    )
    return perplexity(logits, windows, progress=console.progress)


def _evaluate(
    logits: Logits, pretrained: Pretrained, settings: Settings, console: Console
) -> tuple[Perplexity, ExactAnswers]:
    """What ``--eval`` asks for, of the dense model and of the result alike."""
    found = perplexity_of(logits, pretrained, settings, console)
    limit, words = longest(pretrained.model), pretrained.tokenizer
    return found, exact_answers(logits, words, limit=limit, bos=settings.bos, progress=console.progress)
