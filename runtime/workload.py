"""One workload of a model: what is run to say how long it takes."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from ..passes.errors import InputError
from .feeds import make_feed
from .session import CausalSession

FORM = re.compile(r"(?:(decode):(\d+)|(prefill):(\d+)|(run))(?:x(\d+))?")


@dataclass(frozen=True)
class Workload:
    """A call of a model.

    Attributes:
        tokens: of each text in the call; 0 for a model that takes something else than text.
        past: tokens of each text that are in the KV cache.
        batch: texts in the call.
    """

    tokens: int
    past: int = 0
    batch: int = 1

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """Read ``decode:64``, ``prefill:128x8`` or ``run``.

        Raises:
            InputError: it is none of these.
        """
        found = FORM.fullmatch(text)
        batch = int(found[6] or 1) if found else 0
        if not found or batch < 1 or found[4] == "0":
            raise InputError(
                f"--workload {text} is none; want decode:PAST, prefill:TOKENS, or run for a model that takes no text, "
                "and xTEXTS behind it for several at once, such as prefill:128x8"
            )
        if found[5]:
            return cls(0, 0, batch)
        return cls(1, int(found[2]), batch) if found[1] else cls(int(found[4]), 0, batch)

    def __str__(self) -> str:
        many = f"x{self.batch}" if self.batch > 1 else ""
        if not self.tokens:
            return f"run{many}"
        return f"decode:{self.past}{many}" if self.past or self.tokens == 1 else f"prefill:{self.tokens}{many}"

    def feed(self, session: ort.InferenceSession) -> dict[str, Any]:
        """Made-up arrays for a model, the same for every file that takes the same inputs.

        Raises:
            InputError: the model cannot run the workload.
        """
        names = [value.name for value in session.get_inputs()]
        if (self.tokens == 0) == ("input_ids" in names):
            wanted = "decode:PAST or prefill:TOKENS" if "input_ids" in names else "run"
            raise InputError(
                f"--workload {self} does not suit a model that takes {', '.join(names[:3])}; want {wanted}"
            )
        cache = [name for name in names if name.startswith("past_key_values.")]
        if not cache:
            if self.past or (self.tokens == 1 and "input_ids" in names):
                raise InputError(f"--workload {self} wants a KV cache, which this model has not; want prefill:TOKENS")
            one = make_feed(session, {}, {}, seed=0, length=self.tokens or None)
            return {name: np.repeat(array, self.batch, axis=0) for name, array in one.items()}
        model = CausalSession(session)
        ids = np.random.default_rng(0).integers(model.vocabulary, size=(self.batch, self.tokens))
        past = (x.numpy() for x in model.random_past(self.batch, self.past))
        mask = np.ones((self.batch, self.past + self.tokens), np.int64)
        return {"input_ids": ids, "attention_mask": mask, **dict(zip(cache, past, strict=True))}
