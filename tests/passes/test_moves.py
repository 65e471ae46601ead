"""Masks that move while the model is distilled, against a slow loop written from the definition."""

import math

import pytest
import torch
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes import distil as module
from sparsify_export.passes.checkpoint import Checkpoint
from sparsify_export.passes.distil import distil
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.recipe import Distil, Moves
from sparsify_export.passes.trained import Trained
from sparsify_export.passes.tune import shuffling
from toys import export, stack, weights

KEYS = [f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("up", "down")]
RATE, EPOCHS, TOKENS = 0.03, 6, 30  # two batches of 15 tokens a step
BATCHES = [torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(9)]


def toy(pattern):
    program = export(stack(), torch.randn(3, 5, 8))
    parts, dense = partition(program), weights(program)
    params = dict(dense)
    for key in KEYS:
        order = dense[key].abs().argsort(dim=1, descending=True)
        if pattern == NM(2, 4):
            keep = torch.tensor([True, False, False, True]).repeat(dense[key].shape[1] // 4).expand_as(dense[key])
        else:  # rows lose 2, 3, 4, 2 ... weights, and not the smallest
            keep = torch.ones_like(dense[key], dtype=torch.bool)
            for row in range(len(keep)):
                keep[row, order[row, : 2 + row % 3]] = False
        params[key] = torch.where(keep, dense[key], 0.0)
    return parts, dense, params


def net(w, x):
    """The toy as plain functions."""
    linear = torch.nn.functional.linear
    x = linear(x, w["model.first.weight"], w["model.first.bias"])
    for layer in (0, 1):
        hidden = linear(x, w[f"model.layers.{layer}.up.weight"], w[f"model.layers.{layer}.up.bias"]).relu()
        x = x + linear(hidden, w[f"model.layers.{layer}.down.weight"])
    return linear(x, w["model.last.weight"], w["model.last.bias"])


def chosen(shadow, moment, pattern, counts, rank):
    keep = torch.zeros_like(shadow, dtype=torch.bool)
    for row in range(len(shadow)):
        score = [abs(float(x)) for x in shadow[row]]
        if rank == "fisher":
            floor = 1e-6 * float(moment.mean()) + 1e-30
            score = [s * math.sqrt(float(v) + floor) for s, v in zip(score, moment[row], strict=True)]
        width = pattern.m if isinstance(pattern, NM) else len(score)
        kept = pattern.n if isinstance(pattern, NM) else counts[row]
        for begin in range(0, len(score), width):
            places = sorted(range(begin, begin + width), key=lambda place: -score[place])
            keep[row, places[:kept]] = True
    return keep


def slow(dense, params, pattern, moves, seed=0):
    """Weights, masks after every step, and shadows behind zeros after every step."""
    train = [b for index, b in enumerate(BATCHES) if index != 7]  # the eighth of nine decides
    shadow = {key: params[key].clone() for key in KEYS}
    keep = {key: params[key] != 0 for key in KEYS}
    counts = {key: keep[key].sum(dim=1).tolist() for key in KEYS}
    peak = {key: RATE * math.sqrt(float(params[key].square().sum()) / int(keep[key].sum())) for key in KEYS}
    first = {key: torch.zeros_like(shadow[key]) for key in KEYS}
    second = {key: torch.zeros_like(shadow[key]) for key in KEYS}
    masks, behind, number, steps = [], [], 0, len(train) // 2 * EPOCHS
    for epoch in range(EPOCHS):
        order = torch.randperm(len(train), generator=shuffling(seed, epoch)).tolist()
        for begin in range(0, len(order), 2):
            frozen = number >= steps * 2 / 3
            if number and number % moves.every == 0 and not frozen:
                keep = {key: chosen(shadow[key], second[key], pattern, counts[key], moves.score) for key in KEYS}
            live = {key: torch.where(keep[key], shadow[key], 0.0).requires_grad_() for key in KEYS}
            loss, rows = 0.0, 0
            for index in order[begin : begin + 2]:
                p = net(dense, train[index]).softmax(-1).flatten(0, 1)
                q = net({**params, **live}, train[index]).softmax(-1).flatten(0, 1)
                loss, rows = loss + (p * (p / q).log()).sum(), rows + len(p)
            gradients = torch.autograd.grad(loss / rows, [live[key] for key in KEYS])
            done = (epoch + (begin + 2 - 1) / len(order)) / EPOCHS
            factor = min(1.0, done / 0.1) * (1 + math.cos(math.pi * done)) / 2
            number += 1
            for key, gradient in zip(KEYS, gradients, strict=True):
                g = torch.where(keep[key], gradient, 0.0) if frozen else gradient
                first[key] = 0.9 * first[key] + 0.1 * g
                second[key] = 0.95 * second[key] + 0.05 * g * g
                step = first[key] / (1 - 0.9**number) / ((second[key] / (1 - 0.95**number)).sqrt() + 1e-8)
                shadow[key] = shadow[key] - factor * peak[key] * step
                if not frozen:
                    pulled = shadow[key] * (1 - factor * moves.pull)
                    shadow[key] = torch.where(keep[key], shadow[key], pulled)
            masks.append({key: keep[key].clone() for key in KEYS})
            behind.append({key: shadow[key].clone() for key in KEYS})
    return {key: torch.where(keep[key], shadow[key], 0.0) for key in KEYS}, masks, behind


CASES = [
    (NM(2, 4), Moves(2, 0.0, "magnitude")),
    (NM(2, 4), Moves(3, 0.2, "fisher")),
    (Unstructured(0.3), Moves(2, 0.1, "magnitude")),
    (Unstructured(0.3), Moves(5, 0.0, "fisher")),
]


@pytest.mark.parametrize(("pattern", "moves"), CASES, ids=str)
def test_every_step_is_that_of_the_slow_loop(pattern, moves, monkeypatch):
    parts, dense, params = toy(pattern)
    wanted, masks, behind = slow(dense, params, pattern, moves)
    seen = []

    class Watched(Trained):
        def step(self, optimizer, **kw):
            super().step(optimizer, **kw)
            seen.append(
                ({k: m.clone() for k, m in self.keep.items()}, {k: w.detach().clone() for k, w in self.weights.items()})
            )

    monkeypatch.setattr(module, "Trained", Watched)
    found, before = dict(params), dict(params)
    settings = Distil(EPOCHS, RATE, TOKENS, moves=moves)
    batches = [Batch((x,), None) for x in BATCHES]
    report = distil(
        parts, dense, found, KEYS, batches, settings, output="logits", patterns=dict.fromkeys(KEYS, pattern)
    )
    assert len(seen) == len(masks) == 24
    for (keep, shadow), want, its in zip(seen, masks, behind, strict=True):
        for key in KEYS:
            assert torch.equal(keep[key], want[key])
            torch.testing.assert_close(
                torch.where(keep[key], shadow[key], 0.0), torch.where(want[key], its[key], 0.0), rtol=1e-3, atol=1e-5
            )
    for step in range(16):  # what is behind zeros, while they move
        for key in KEYS:
            torch.testing.assert_close(seen[step][1][key], behind[step][key], rtol=1e-3, atol=1e-5)
    for key in KEYS:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=1e-5)
        assert not torch.signbit(found[key][found[key] == 0]).any()
    assert report.after < 0.8 * report.before
    kept = sum(int((before[key] != 0).sum()) for key in KEYS)
    new = sum(int((masks[-1][key] & (before[key] == 0)).sum()) for key in KEYS)
    assert new > 0
    assert report.moved == pytest.approx(new / kept)
    assert all(torch.equal(found[key], before[key]) for key in found if key not in KEYS)


@pytest.mark.parametrize(("pattern", "moves"), CASES, ids=str)
def test_the_pattern_holds_at_every_step_and_the_last_third_is_frozen(pattern, moves):
    _, dense, params = toy(pattern)
    _, masks, _ = slow(dense, params, pattern, moves)
    assert any(not torch.equal(masks[0][key], masks[15][key]) for key in KEYS)
    for step, keep in enumerate(masks):
        for key in KEYS:
            if isinstance(pattern, NM):
                assert (keep[key].reshape(-1, 4).sum(1) == 2).all()
            else:
                assert torch.equal(keep[key].sum(1), (params[key] != 0).sum(1))
            if step >= 16:
                assert torch.equal(keep[key], masks[15][key])


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("pattern", "moves"), CASES[1:3], ids=str)
@pytest.mark.parametrize("stop", [20, 43])  # of 48 batches: while masks move, and after that
def test_going_on_gives_what_was_not_stopped(pattern, moves, stop, tmp_path):
    parts, dense, params = toy(pattern)

    def run(checkpoint, progress=lambda *told: None):
        found = dict(params)
        report = distil(
            parts,
            dense,
            found,
            KEYS,
            [Batch((x,), None) for x in BATCHES],
            Distil(EPOCHS, RATE, TOKENS, moves=moves),
            output="logits",
            patterns=dict.fromkeys(KEYS, pattern),
            progress=progress,
            checkpoint=checkpoint,
        )
        return found, report

    def stopping(stage, done, total):
        if done == stop:
            raise Stopped

    whole = run(None)
    kept = Checkpoint.open(tmp_path / "kept", {})
    with pytest.raises(Stopped):
        run(kept, stopping)
    again = run(kept)
    assert again[1] == whole[1]
    assert all(torch.equal(again[0][key], whole[0][key]) for key in whole[0])


def test_masks_that_never_get_to_move_are_those_that_stay():
    parts, dense, params = toy(NM(2, 4))
    batches = [Batch((x,), None) for x in BATCHES]
    still, late = dict(params), dict(params)
    one = distil(parts, dense, still, KEYS, batches, Distil(EPOCHS, RATE, TOKENS), output="logits")
    settings = Distil(EPOCHS, RATE, TOKENS, moves=Moves(every=99))
    other = distil(parts, dense, late, KEYS, batches, settings, output="logits", patterns=dict.fromkeys(KEYS, NM(2, 4)))
    assert (one.moved, other.moved) == (None, 0.0)
    for key in KEYS:
        torch.testing.assert_close(still[key], late[key], rtol=1e-4, atol=1e-6)
