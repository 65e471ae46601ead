"""Slow oracles: the definitions written out as plain loops over Python numbers, to be read next to the paper."""

import itertools
import math
from collections.abc import Iterator
from functools import cache

import torch


def norms(x: torch.Tensor) -> list[float]:
    """L2 norm of each column of ``x [tokens, K]``."""
    return [math.sqrt(math.fsum(value * value for value in column)) for column in x.double().T.tolist()]


def wanda(weight: torch.Tensor, act_norm: torch.Tensor) -> torch.Tensor:
    """``|W_ij| * ||X_j||``."""
    norm = act_norm.tolist()
    return torch.tensor([[abs(w) * norm[j] for j, w in enumerate(row)] for row in weight.tolist()]).reshape(
        weight.shape
    )


def ria(weight: torch.Tensor, act_norm: torch.Tensor, power: float) -> torch.Tensor:
    """``(|W_ij| / sum of column + |W_ij| / sum of row) * ||X_j||**power``; 0/0 is 0."""
    rows, columns = weight.shape
    score = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            value = abs(weight[i, j].item())
            if value:
                column = math.fsum(abs(v) for v in weight[:, j].tolist())
                row = math.fsum(abs(v) for v in weight[i].tolist())
                score[i, j] = (value / column + value / row) * act_norm[j].item() ** power
    return score


def nm_keep_mask(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the ``n`` best of every ``m``; of equals the first."""
    keep = torch.zeros(score.shape, dtype=torch.bool)
    for i, row in enumerate(score.tolist()):
        for start in range(0, len(row), m):
            for j in sorted(range(start, start + m), key=lambda j, row=row: (-row[j], j))[:n]:
                keep[i, j] = True
    return keep


def fraction_keep_mask(score: torch.Tensor, pruned: int, per: str) -> torch.Tensor:
    """Prune the ``pruned`` lowest of every row or of the matrix; of equals the first are kept."""
    groups = score.tolist() if per == "row" else [score.flatten().tolist()]
    keep = []
    for group in groups:
        best_first = sorted(range(len(group)), key=lambda j, group=group: (-group[j], j))
        kept = set(best_first[: len(group) - pruned])
        keep += [j in kept for j in range(len(group))]
    return torch.tensor(keep, dtype=torch.bool).reshape(score.shape)


def retained_nm(score: torch.Tensor, n: int, m: int) -> float:
    """Sum of the ``n`` best of every ``m``, over the sum of all."""
    kept = everything = 0.0
    for row in score.tolist():
        everything += math.fsum(row)
        for start in range(0, len(row), m):
            kept += math.fsum(sorted(row[start : start + m])[m - n :])
    return kept / everything


def snake(importance: list[float], m: int) -> list[list[int]]:
    """Deal channels in ascending importance, ``m`` runs, every second run backwards; the channels of each group."""
    ascending = sorted(range(len(importance)), key=lambda j: (importance[j], j))
    count = len(importance) // m
    groups: list[list[int]] = [[] for _ in range(count)]
    for run in range(m):
        for step in range(count):
            group = step if run % 2 == 0 else count - 1 - step
            groups[group].append(ascending[run * count + step])
    return groups


def partitions(channels: list[int], m: int) -> Iterator[list[int]]:
    """Every way to split ``channels`` into groups of ``m``, flattened; groups and members in ascending order."""
    if not channels:
        yield []
        return
    first, rest = channels[0], channels[1:]
    for others in itertools.combinations(rest, m - 1):
        left = [channel for channel in rest if channel not in others]
        for tail in partitions(left, m):
            yield [first, *others, *tail]


def best_retained_nm(score: torch.Tensor, n: int, m: int) -> float:
    """The most that any channel order retains, by trying all groupings."""
    return max(retained_nm(score[:, order], n, m) for order in partitions(list(range(score.shape[1])), m))


def accelerator_cycles(keep: list[list[bool]], is_global: list[bool], tokens: int, *, published: bool) -> int:
    """Cycles of one split, multiplier by multiplier; see tools/sparsify_export/simulator.py."""
    rows, columns = len(keep), len(keep[0])
    count = sum(is_global)
    lengths = [sum(keep[i][j] for j in range(columns) if not is_global[j]) for i in range(rows)]
    work = rows * count + sum(lengths)
    dense = 64 * rows * count // work if work else 0
    if count and sum(lengths):
        dense = min(max(dense, 1), 63)
    if published:
        in_dense = math.ceil(columns * count / (64 * dense)) if count else 0
        return max(in_dense, math.ceil(sum(lengths) / (64 * (64 - dense))) if sum(lengths) else 0)
    in_dense = in_sparse = 0
    for first in range(0, rows, 64):
        if count:
            in_dense += tokens * math.ceil(count / dense)
        if longest := max(lengths[first : first + 64]):
            in_sparse += tokens * math.ceil(longest / (64 - dense))
    others = columns - count
    bits = min(rows * others, sum(lengths) * (others - 1).bit_length()) if others > 1 and sum(lengths) else 0
    return max(in_dense, in_sparse, math.ceil((rows * count + sum(lengths) + bits / 8) / 153.6))


def accelerator_best(keep: list[list[bool]], *, published: bool, tokens: int = 1) -> int:
    """The fewest cycles of the splits that are tried, the whole matrix at once (of one patch, as published)."""
    rows, columns = len(keep), len(keep[0])
    heights = [sum(row[j] for row in keep) for j in range(columns)]
    tried = [] if published else [[True] * columns, [False] * columns]
    tenths = 5
    for _ in range(5):
        tried.append([height * 10 > tenths * rows for height in heights])
        share = sum(h for h, is_global in zip(heights, tried[-1], strict=True) if is_global) / max(1, sum(heights))
        if 0.4 < share < 0.6:
            break
        tenths += 1 if share >= 0.6 else -1
    return min(accelerator_cycles(keep, split, tokens, published=published) for split in tried)


def ranks(score: torch.Tensor) -> torch.Tensor:
    """The place of every weight when its row is pruned from the lowest score up; of equals the last goes first."""
    rank = torch.zeros(score.shape, dtype=torch.int64)
    for i, row in enumerate(score.tolist()):
        for place, j in enumerate(sorted(range(len(row)), key=lambda j, row=row: (row[j], -j))):
            rank[i, j] = place
    return rank


def straight_through(
    weight: torch.Tensor, rank: torch.Tensor, beta: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """BESA's masked weight with every probability written out: ``mask = hard - stopgrad(P) + P``."""
    rows, columns = weight.shape
    beta = beta.expand(rows, -1)
    hard = torch.zeros(rows, columns)
    pruned = [[beta.new_zeros(()) for _ in range(columns)] for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            place = int(rank[i, j])
            hard[i, j] = place >= int(counts.expand(rows)[i])
            for d in range(beta.shape[1]):
                if place < d * columns // (beta.shape[1] - 1):
                    pruned[i][j] = pruned[i][j] + beta[i, d]
    keep = 1 - torch.stack([torch.stack(row) for row in pruned])
    return weight * (hard + (keep - keep.detach()))


class Prodigy:
    """Algorithm 4 of Mishchenko and Defazio 2023 on Python numbers."""

    def __init__(self, x: list[float], growth: float, d0: float) -> None:
        self.x, self.start, self.growth, self.d, self.r = list(x), list(x), growth, d0, 0.0
        self.m, self.v, self.s = [0.0] * len(x), [0.0] * len(x), [0.0] * len(x)

    def step(self, grad: list[float]) -> None:
        b1, b2, d = 0.9, 0.999, self.d
        self.r = b2**0.5 * self.r + d * d * sum(g * (o - x) for g, o, x in zip(grad, self.start, self.x, strict=True))
        for i, g in enumerate(grad):
            self.m[i] = b1 * self.m[i] + (1 - b1) * d * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * d * d * g * g
            self.s[i] = b2**0.5 * self.s[i] + d * d * g
            self.x[i] -= d * self.m[i] / (math.sqrt(self.v[i]) + d * 1e-8)
        self.d = max(d, self.growth * self.r / sum(abs(s) for s in self.s))


def hessian(x: torch.Tensor) -> torch.Tensor:
    """``2/n`` times the sum over tokens of ``x_i x_j``, for ``x [tokens, C]``."""
    columns = x.double().T.tolist()
    sums = [[math.fsum(a * b for a, b in zip(one, other, strict=True)) for other in columns] for one in columns]
    return torch.tensor(sums, dtype=torch.float64) * 2 / len(x)


def best_weight(weight: torch.Tensor, hessian: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The weights under a mask with the least error: one small linear system a row."""
    best = torch.zeros_like(weight, dtype=torch.float64)
    for i, kept in enumerate(keep):
        free = kept.nonzero()[:, 0]
        pull = (hessian.double() @ weight[i].double())[free]
        best[i, free] = torch.linalg.solve(hessian.double()[free][:, free], pull)
    return best


def obs_sweep(
    weight: torch.Tensor, hessian: torch.Tensor, keep: torch.Tensor | None = None, nm: tuple[int, int] = (0, 1)
) -> torch.Tensor:
    """Prune column after column by Optimal Brain Surgeon, the columns to the left being done, row by row.

    The inverse is taken anew for the columns that are left, straight from the definition. Without a mask, the ``n``
    most salient of every ``m`` are kept, seen from the first of them.
    """
    done = weight.double().clone()
    columns = weight.shape[1]
    inverses = [torch.linalg.inv(hessian.double()[j:, j:]) for j in range(columns)]
    for row in range(len(weight)):
        kept: list[bool] = [] if keep is None else keep[row].tolist()
        for j in range(columns):
            n, m = nm
            if keep is None and j % m == 0:
                loss = [done[row, k].item() ** 2 / inverses[k][0, 0].item() for k in range(j, j + m)]
                best = sorted(range(m), key=lambda k, loss=loss: (-loss[k], k))[:n]
                kept += [k in best for k in range(m)]
            if not kept[j]:
                done[row, j:] -= done[row, j].item() / inverses[j][0, 0] * inverses[j][0]
                done[row, j] = 0.0
    return done


def admm(weight: torch.Tensor, hessian: torch.Tensor, keeps: list[torch.Tensor]) -> torch.Tensor:
    """ADMM in scaled form with penalty 1, one keep mask an iteration; every step solved from its definition."""
    w = w0 = weight.double()
    matrix = hessian.double()
    dual = torch.zeros_like(w)
    shifted = matrix + torch.eye(len(matrix), dtype=torch.float64)
    for keep in keeps:
        z = (w + dual) * keep
        dual = dual + w - z
        w = torch.stack([torch.linalg.solve(shifted, matrix @ w0[i] + z[i] - dual[i]) for i in range(len(w))])
    return (w + dual) * keeps[-1]


def alps(
    weight: torch.Tensor, hessian: torch.Tensor, nm: tuple[int, int], iterations: int
) -> tuple[torch.Tensor, list[float]]:
    """ALPS in unscaled form, group by group and row by row; and the penalty of every step that was taken."""
    b = d = w0 = weight.double()
    matrix, identity = hessian.double(), torch.eye(len(hessian), dtype=torch.float64)
    v, penalty, penalties, supports = torch.zeros_like(w0), 0.1, [], []
    for _ in range(iterations):
        penalties.append(penalty)
        b = torch.linalg.solve(matrix + penalty * identity, (w0 @ matrix - v + penalty * d).mT).mT
        d = torch.zeros_like(b)
        for row in range(len(b)):
            wanted = b[row] + v[row] / penalty
            for start in range(0, len(wanted), nm[1]):
                for j in sorted(range(start, start + nm[1]), key=lambda j: -abs(wanted[j].item()))[: nm[0]]:
                    d[row, j] = wanted[j]
        v = v + penalty * (b - d)
        supports.append({(i, j) for i, j in d.nonzero().tolist()})
        if len(supports) % 3 == 0 and len(supports) > 3:
            changed = len(supports[-1] - supports[-4])
            if changed == 0:
                break
            share = changed / len(supports[-1])
            penalty *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
    return d, penalties


def on_grid(value: float, scale: float, limit: int) -> float:
    """The nearest of ``-limit .. limit`` times ``scale``; ties to even."""
    if scale == 0:
        return 0.0
    return max(-limit, min(limit, round(value / scale))) * scale


def quantised_sweep(
    weight: torch.Tensor, hessian: torch.Tensor, keep: torch.Tensor, scale: torch.Tensor, limit: int
) -> torch.Tensor:
    """Optimal Brain Surgeon that rounds: column by column, with the inverse of the columns that are left taken anew.

    ``scale [R, C]`` is that of every weight.
    """
    done = weight.double().clone()
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian.double()[j:, j:])
        for row in range(len(weight)):
            value = done[row, j].item()
            wanted = on_grid(value, scale[row, j].item(), limit) if keep[row, j] else 0.0
            done[row, j:] -= (value - wanted) / inverse[0, 0] * inverse[0]
            done[row, j] = wanted
    return done


def quantised_descent(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    keep: torch.Tensor,
    scale: torch.Tensor,
    limit: int,
    start: torch.Tensor,
    passes: int,
) -> torch.Tensor:
    """Every kept weight in turn to the place on its grid where the row's error is least, found by trying them all."""
    done, matrix = start.double().clone(), hessian.double()
    for _ in range(passes):
        for row in range(len(weight)):
            for j in range(weight.shape[1]):
                if not keep[row, j]:
                    continue
                tried = []
                for code in range(-limit, limit + 1):
                    moved = done[row] - weight[row].double()
                    moved[j] = code * scale[row, j].item() - weight[row, j].item()
                    tried.append(((moved @ matrix @ moved).item(), code))
                done[row, j] = min(tried)[1] * scale[row, j].item()
    return done


@cache
def eight_bit_codes(kind: str) -> list[tuple[float, bool]]:
    """Every code there is, and whether its last digit is even."""
    if kind == "int8":
        return [(float(code), code % 2 == 0) for code in range(-128, 128)]
    positive = [(m / 8 * 2.0**-6, m % 2 == 0) for m in range(8)]
    positive += [
        ((1 + m / 8) * 2.0 ** (e - 7), m % 2 == 0) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
    ]
    return [*positive, *((-code, even) for code, even in positive[1:])]


def eight_bit(x: float, scale: float, kind: str) -> float:
    """The nearest code times the scale: of equally near ones that with an even last digit, beyond the ends the end."""
    steps = x / scale
    return min(eight_bit_codes(kind), key=lambda code: (abs(code[0] - steps), not code[1]))[0] * scale
