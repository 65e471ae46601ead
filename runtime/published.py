"""What a model itself returns: the truth of verification, which shares nothing with the graph that we traced.

The weights that the file will hold are put into the published model. Its own forward is then asked, and for a decoder
transformers' own generation loop, which walks through whatever boundary the model has (sliding windows, caches).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..passes.frontend.batches import Batch
from ..passes.frontend.kv_cache import empty_past
from ..passes.frontend.trace import PREFIX, Traced, encoded
from ..passes.fx.experts import restacked
from ..passes.fx.products import Turned
from ..passes.mapped import mapped

DECODED = 8
"""How many tokens of a text the generation loop writes, and the file is then fed one by one."""


@dataclass(frozen=True)
class Published:
    """A batch, and what the model returns for it.

    Attributes:
        batch: of a decoder, with the tokens that the model wrote at the end of each text.
        outputs: its float tensors in the order of the graph's outputs, of a decoder the logits; see `counted`.
        decoded: of a decoder, ``[batch, 8, vocabulary]``: the logits that the generation loop chose the last tokens by.
    """

    batch: Batch
    outputs: tuple[Tensor, ...]
    decoded: Tensor | None


def put_weights(model: Any, params: Mapping[str, Tensor], turned: Mapping[str, Turned]) -> None:
    """Give a model the weights of its program, in float32 parameters of its own.

    The program holds the parameters that the model was traced with: changed in place, they would change what is
    exported, and the model would be compared with itself. Weights of 16 bits are widened: torch adds up products of
    16 bits in another way on every processor (30 layers of SmolLM2 in float16, share of the largest logit: 4.5e-2 on
    one without such instructions), and what is asked here is which function the model is, not how it rounds.

    Args:
        model: its modules get other parameters.
        params: weights by their key in the canonical program.
        turned: the parameters that ``canonicalise`` turned, by key.
    """
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        key = PREFIX + name
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        value = params[key] if key in params else module.get_parameter(leaf)
        experts = restacked(name, value.shape, params, key in turned)
        if experts is not None:
            own = mapped(experts.float())
        else:
            own = (turned[key].original(value) if key in turned and key in params else value).detach().float()
        module.register_parameter(leaf, torch.nn.Parameter(own, requires_grad=False))


def ask(model: Any, traced: Traced, batch: Batch) -> Published:
    """Run the model on a batch; a decoder first continues every text by ``DECODED`` tokens.

    Padding is in front of a decoder's texts, and each text runs alone in its forward, without padding: that is what
    padding must not change. An encoder is called as it is published, with the padded batch and its mask.
    """
    with torch.no_grad():
        if traced.kind != "causal":
            given = dict(zip(traced.inputs, batch.inputs, strict=True))
            outputs = encoded(model, given).values()
            return Published(batch, tuple(x for x in outputs if x.is_floating_point()), None)
        ids, mask, decoded = _generate(model, traced, *batch.inputs[:2])
        rows = [
            model(input_ids=ids[row : row + 1, mask[row] == 1], use_cache=False).logits[0] for row in range(len(ids))
        ]
        past = [x for pair in empty_past(traced.cache, len(ids), model.dtype) for x in pair]
        longer = replace(batch, inputs=(ids, mask, *past), token_mask=mask.bool())
        return Published(longer, (torch.cat(rows),), decoded)


def counted(output: Tensor, batch: Batch) -> Tensor:
    """The entries of an output that belong to tokens, where it has some for each token; else all of it."""
    mask = batch.token_mask
    return output if mask is None or output.shape[:2] != mask.shape else output[mask]


def _generate(model: Any, traced: Traced, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy continuation by transformers; ids, mask and the logits of the last tokens, each made from the cache."""
    ruled = GenerationConfig(
        do_sample=False,
        min_new_tokens=DECODED,
        max_new_tokens=DECODED,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    positions = {}
    if traced.first is not None:  # where it is not told, the loop counts from 0 whatever the model
        positions["position_ids"] = traced.first + (mask.cumsum(-1) - 1).clamp(min=0)
    made = model.generate(ids, attention_mask=mask, generation_config=ruled, **positions)
    longer = torch.cat([mask, mask.new_ones(len(mask), DECODED)], dim=1)
    return made.sequences, longer, torch.stack(made.logits, dim=1)
