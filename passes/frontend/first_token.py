"""The token that a text begins with: one rule for calibrating, evaluating and generating."""

from typing import Any


def first_token(tokenizer: Any) -> int | None:
    """The beginning-of-text token that a tokenizer itself puts in front of a text; None where it puts none.

    A model that was trained with it gets lost without it, and one that was trained without it gets worse with it; what
    the model was trained with is what its tokenizer does. A token that a tokenizer has but does not put there (GPT-2,
    SmolLM2) is therefore left out, and so is one that means something else to encoders (BERT's ``[CLS]``).
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    return int(bos) if tokenizer("a", verbose=False)["input_ids"][:1] == [bos] else None


def tokens_of(tokenizer: Any, text: str, first: int | None) -> list[int]:
    """The tokens of a text with ``first`` in front, once: not where the text begins with it already.

    What a tokenizer puts behind a text is left out, for the text goes on.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if first is None or ids[:1] == [first] else [first, *ids]
