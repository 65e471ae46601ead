"""Greedy text: with the KV cache of an exported file, and without one in torch as the truth to compare with."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..passes.errors import InputError
from .session import CausalSession


@dataclass(frozen=True)
class Generation:
    """What was written, and how fast.

    Attributes:
        tokens: for every prompt its new tokens, an end-of-text token included where one ended it.
        prompt_tokens: tokens read in one go, all prompts together, padding left out.
        decoded_tokens: tokens written one by one, all prompts together; the first of each comes from the prompt's run.
        prefill_seconds: reading the prompts.
        decode_seconds: writing the decoded tokens.
    """

    tokens: tuple[tuple[int, ...], ...]
    prompt_tokens: int
    decoded_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second; 0 where nothing was decoded."""
        return self.decoded_tokens / self.decode_seconds if self.decoded_tokens else 0.0


def generate(
    session: CausalSession, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos: Collection[int] = ()
) -> Generation:
    """Continue prompts with the most likely token each time.

    Prompts of different length are padded on the left. A row that has ended goes on with its last token, unseen,
    until all have ended.

    Args:
        session: the model.
        prompts: token ids, one sequence a row.
        max_new_tokens: how many tokens a row gets at most.
        eos: tokens that end a row.

    Raises:
        InputError: there is no prompt, a prompt is empty or holds an id outside the vocabulary, or logits are NaN.
    """
    ids, mask = _padded(prompts, session.vocabulary)
    start = time.perf_counter()
    logits, past = session.step(ids, mask, session.empty_past(len(ids)))
    prefilled = time.perf_counter()
    rows: list[list[int]] = [[] for _ in prompts]
    live = set(range(len(rows)))
    decoded = 0
    for step in range(max_new_tokens):
        if step:
            mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
            logits, past = session.step(ids, mask, past)
            decoded += len(live)
        last = logits[:, -1]
        if not np.isfinite(last.max(axis=1)).all():  # a NaN anywhere makes the maximum NaN
            raise InputError("the model's logits are not finite; it is damaged")
        ids = last.argmax(axis=1)[:, None].astype(np.int64)
        for row in sorted(live):
            rows[row].append(int(ids[row, 0]))
        live = {row for row in live if rows[row][-1] not in eos}
        if not live:
            break
    end = time.perf_counter()
    return Generation(tuple(map(tuple, rows)), sum(map(len, prompts)), decoded, prefilled - start, end - prefilled)


@torch.inference_mode()
def greedy_torch(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos: Collection[int] = ()
) -> tuple[tuple[int, ...], ...]:
    """The same tokens from a transformers model, each prompt alone, without padding and without a cache.

    Slow: every token runs the whole text again. It is what ``generate`` must agree with.
    """
    rows = []
    for prompt in prompts:
        text = list(prompt)
        while len(text) < len(prompt) + max_new_tokens and (len(text) == len(prompt) or text[-1] not in eos):
            text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        rows.append(tuple(text[len(prompt) :]))
    return tuple(rows)


def _padded(prompts: Sequence[Sequence[int]], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask ``[rows, longest]``, prompts at the right-hand side."""
    if not prompts or not all(prompts):
        raise InputError("a prompt is empty; want at least one token")
    if outside := [i for prompt in prompts for i in prompt if not 0 <= i < vocabulary]:
        raise InputError(f"a prompt holds token {outside[0]}; the model knows 0 to {vocabulary - 1}")
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
