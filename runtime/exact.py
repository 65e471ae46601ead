"""Exact answers: copying, brackets and arithmetic, before and after; perplexity hides damage that these show.

Perplexity is a mean over all tokens, most of them easy. Here one wrong token makes an answer wrong. The problems are
our own and made with a seed, so no data set is needed.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..passes.errors import InputError
from ..passes.frontend.first_token import first_token, tokens_of
from .evaluate import Logits

COUNT = 50
"""Problems of each task; one standard deviation of a score is at most 7 points."""

SHOTS = 4
SYMBOLS = "abcdefghkmnpqrstuvwxyz23456789"
COPIED, DEEPEST, BELOW = 8, 3, 20
OPENING, CLOSING = "([{<", ")]}>"


@dataclass(frozen=True)
class Problem:
    """A question behind a few solved ones.

    Attributes:
        task: ``copying``, ``brackets`` or ``arithmetic``.
        prompt: the text to continue.
        answer: its only right continuation; the end of the line has to follow.
    """

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class ExactAnswers:
    """Fractions of problems answered exactly.

    Attributes:
        scores: by task.
        count: problems of each task.
        seed: they were made with.
    """

    scores: Mapping[str, float]
    count: int
    seed: int

    def __str__(self) -> str:
        return ", ".join(f"{task} {score:.0%}" for task, score in self.scores.items())


def make_problems(*, count: int = COUNT, seed: int = 0) -> list[Problem]:
    """The same ``count`` different problems of each task for every model, with a few solved ones in front.

    There are 84 bracket problems, so ``count`` is 80 at most.
    """
    made = []
    for task, make in (("copying", _copying), ("brackets", _brackets), ("arithmetic", _arithmetic)):
        draw = random.Random(f"{task} {seed}")
        different: dict[str, str] = {}
        while len(different) < SHOTS + count:
            different.update([make(draw)])
        solved, asked = list(different.items())[:SHOTS], list(different.items())[SHOTS:]
        shots = "".join(f"{question}{answer}\n" for question, answer in solved)
        made += [Problem(task, shots + question, answer) for question, answer in asked]
    return made


def exact_answers(
    logits: Logits,
    tokenizer: Any,
    *,
    count: int = COUNT,
    seed: int = 0,
    limit: int | None = None,
    bos: bool = True,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> ExactAnswers:
    """How many answers greedy decoding writes exactly, the end of the line included.

    Greedy decoding writes a text if and only if each of its tokens is the most likely one after those before it, so
    the whole text runs once instead of token by token.

    Args:
        logits: the model; ``torch_logits`` and ``onnx_logits`` make one.
        tokenizer: the model's.
        count: problems of each task.
        seed: of the problems.
        limit: tokens that the model takes at most; None for any number.
        bos: put in front of every problem what the tokenizer puts in front of a text; see ``first_token``.
        progress: told what is done, how many problems are, and how many there are.

    Raises:
        InputError: a problem is longer than ``limit``, or logits are NaN.
    """
    problems = make_problems(count=count, seed=seed)
    first = first_token(tokenizer) if bos else None
    right: dict[str, int] = {}
    for index, problem in enumerate(problems):
        ids, start = _tokens(tokenizer, problem, first)
        if limit is not None and len(ids) > limit:
            raise InputError(f"the exact-answer problems have {len(ids)} tokens, and the model takes {limit}")
        right[problem.task] = right.get(problem.task, 0) + _writes(logits, ids, start)
        progress("exact answers", index + 1, len(problems))
    return ExactAnswers({task: solved / count for task, solved in right.items()}, count, seed)


def _tokens(tokenizer: Any, problem: Problem, first: int | None) -> tuple[list[int], int]:
    """The whole text as tokens, and where it stops being the prompt's."""
    prompt = tokens_of(tokenizer, problem.prompt, first)
    ids = tokens_of(tokenizer, f"{problem.prompt}{problem.answer}\n", first)
    same = [a == b for a, b in zip(prompt, ids, strict=False)]
    return ids, max(1, same.index(False) if False in same else len(same))


def _writes(logits: Logits, ids: Sequence[int], start: int) -> bool:
    """Whether the most likely tokens from ``start`` on are those of ``ids``."""
    text = torch.tensor([ids])
    with torch.inference_mode():
        rows = logits(text)[0, start - 1 : -1]
    if not bool(rows.amax(dim=-1).isfinite().all()):  # a NaN anywhere makes the maximum NaN
        raise InputError("the model's logits are not finite; it is damaged")
    return torch.equal(rows.argmax(dim=-1), text[0, start:])


def _copying(draw: random.Random) -> tuple[str, str]:
    symbols = " ".join(draw.choice(SYMBOLS) for _ in range(COPIED))
    return f"{symbols} ->", f" {symbols}"


def _brackets(draw: random.Random) -> tuple[str, str]:
    opened = [draw.randrange(len(OPENING)) for _ in range(draw.randint(1, DEEPEST))]
    return (
        " ".join(OPENING[kind] for kind in opened) + " ->",
        "".join(f" {CLOSING[kind]}" for kind in reversed(opened)),
    )


def _arithmetic(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(BELOW), draw.randrange(BELOW)
    return f"{a} + {b} =", f" {a + b}"
