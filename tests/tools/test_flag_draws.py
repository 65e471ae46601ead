"""Flags at random: every set makes a recipe or one sentence, and sets that hold every flag are pruned and packed."""

import random
from dataclasses import fields
from functools import cache
from types import MappingProxyType

import pytest
import torch
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.effort import Flags, make_recipe
from sparsify_export.passes.dialect.storage import FP32, Storage
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.rewrite import lower_linears, stored_weights
from sparsify_export.passes.sparsify import sparsify
from toys import export, stack, weights

DRAWS = 4000
MOST = 40
"""Sets that are pruned, at most; so many are enough for every value of every flag."""
VALUES = MappingProxyType(
    {
        "pattern": (NM(2, 4), NM(1, 4), NM(4, 8), NM(1, 3), Unstructured(0.5), Unstructured(0.2)),
        "effort": ("fast", "balanced", "best"),
        "score": ("ria", "wanda", "magnitude", "hessian"),
        "ria_power": (0.0, 1.0),
        "permute": ("fold", "none"),
        "skip": (("*.0.up",),),
        "update": ("none", "sparsegpt", "admm", "cg", "admm-cg", "alps"),
        "mask_from": ("update", "score"),
        "hessian": ("inputs", "attended"),
        "damping": (0.0, 0.5),
        "allocate": ("none", "besa-row", "besa-layer", "besa-nm"),
        "besa_reference": ("pruned", "dense"),
        "besa_optimiser": ("adamw", "prodigy"),
        "besa_logits": ("softmax", "sigmoid"),
        "besa_rate_step": (0.1,),
        "besa_epochs": (1,),
        "besa_patterns": ("2:4,dense", "1:3,3:6"),
        "tune": ("none", "halves", "block"),
        "tune_epochs": (1,),
        "tune_lr": (0.01,),
        "distil": (0, 1),
        "distil_lr": (0.01,),
        "mask_moves": (0, 2),
        "mask_rank": ("magnitude", "fisher"),
        "mask_pull": (0.1,),
        "quantise": ("rtn", "sweep", "joint"),
        "storage": (Storage("fp16"), Storage("bf16"), Storage("int8"), Storage("int4", 32)),
        "inputs": (False, True),
        "seed": (3,),
    }
)


def drawn(draw):
    given = {}
    for name, values in VALUES.items():
        if name == "pattern" or draw.random() < 0.12:
            given[name] = draw.choice(values)
    if any(name.startswith("besa") for name in given):  # or nearly all of these would be refused
        given |= {"allocate": draw.choice(VALUES["allocate"][1:]), "pattern": draw.choice(VALUES["pattern"][4:])}
    learned = {"mask_rank": "mask_moves", "mask_pull": "mask_moves", "mask_moves": "distil", "distil_lr": "distil"}
    for name, wanted in {"tune_epochs": "tune", "tune_lr": "tune", **learned}.items():
        if name in given:
            given[wanted] = VALUES[wanted][-1]
    if "quantise" in given:
        given["storage"] = draw.choice(VALUES["storage"][2:])
    return given


@cache
def accepted():
    """The sets that make a recipe; what refuses the others is one line."""
    draw, found, refused = random.Random(0), [], []
    for _ in range(DRAWS):
        given = drawn(draw)
        flags = Flags(**{name: value for name, value in given.items() if name != "pattern"})
        try:
            found.append((given, make_recipe(given["pattern"], flags, onnx=False)))
        except InputError as error:
            refused.append(str(error))
    assert all(sentence.startswith("--") and "\n" not in sentence for sentence in refused)
    return found


def covering():
    """Few of them that hold every value of every flag, the greediest first."""
    left = {(name, value) for name, values in VALUES.items() for value in values}
    sets = [({*given.items()}, given, recipe) for given, recipe in accepted()]
    picked = []
    while left:
        pairs, given, recipe = max(sets, key=lambda each: len(each[0] & left))
        assert pairs & left, f"no recipe has any of {left}"
        left -= pairs
        picked.append((given, recipe))
    return picked


def test_every_flag_is_drawn():
    assert {*VALUES} == {field.name for field in fields(Flags)} - {"given"} | {"pattern"}
    assert 400 < len(accepted()) < DRAWS
    assert len(covering()) <= MOST


@pytest.mark.parametrize("index", range(MOST))
def test_what_makes_a_recipe_is_pruned_and_packed(index):
    sets = covering()
    if index >= len(sets):
        return
    given, recipe = sets[index]
    program = export(stack(width=24, hidden=48), torch.randn(3, 5, 24))
    params, x = weights(program), torch.randn(4, 2, 30, 24, generator=torch.Generator().manual_seed(3))
    done = sparsify(partition(program), params, recipe, [Batch((each,), None) for each in x], output="values")
    program.state_dict.update({key: params[key] for key in program.state_dict})
    storage = given.get("storage", FP32)
    lowered = lower_linears(program, storage=storage, on_grid=done.on_grid, patterns=done.patterns)
    packed = stored_weights(program, lowered)
    assert packed
    for key, its in packed.items():
        assert bool(params[key].isfinite().all())
        rounded = params[key] if storage.quantised else params[key].to(storage.dtype).float()
        if key in done.on_grid or not storage.quantised:
            assert torch.equal(its.unpack(), rounded)
        assert torch.equal(its.unpack() == 0, rounded == 0) or storage.quantised
