"""Which channels of a network may swap places: colour refinement on the graph of what depends on what.

An *atom* is one channel of one tensor of the network: a function of the token position, or one entry along
one dimension of a parameter. Two atoms are *tied* when one cannot move without the other (``y = silu(x)``
ties ``y[i]`` to ``x[i]``). Atoms connected by ties form a *component*: everything that moves when one channel
moves. Two components may swap places when they look the same from every operation.

"Looks the same" is decided by colours, refined until nothing changes (1-dimensional Weisfeiler-Leman). A
component in which every colour is unique is a tree of named parts, so equal colours give exactly one way to
map one component on the other, and every tie is kept by it: the swap is a symmetry of the network. A
component that holds a colour twice, or a pinned atom, stays where it is. Colours are 64-bit hashes; with n
atoms two different colours coincide with probability about n^2 / 2^65.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

IntArray = npt.NDArray[np.int64]
Colours = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Symmetry:
    """What may swap with what.

    Attributes:
        component: for each atom, the number of its component.
        colour: for each atom, which part of its component it is; unique inside a movable component.
        kind: for each atom, -1 if it is pinned; otherwise components of equal kind may swap places.
    """

    component: IntArray
    colour: Colours
    kind: IntArray


class Atoms:
    """All atoms seen so far and what is known about them; grows while a graph is walked."""

    def __init__(self) -> None:
        self._colour: Colours = np.zeros(1024, np.uint64)
        self._pinned = np.zeros(1024, np.bool_)
        self._count = 0
        self._ties: list[tuple[IntArray, IntArray, int]] = []
        self._keys = 0

    def fresh(self, shape: tuple[int, ...], *, pinned: bool = False) -> IntArray:
        """Make new atoms, all of one new colour, and return their numbers in an array of ``shape``."""
        count = int(np.prod(shape, dtype=np.int64))
        while self._count + count > len(self._colour):
            self._colour = np.concatenate([self._colour, np.zeros_like(self._colour)])
            self._pinned = np.concatenate([self._pinned, np.zeros_like(self._pinned)])
        atoms = np.arange(self._count, self._count + count)
        self._count += count
        self._colour[atoms] = _mix(np.zeros(1, np.uint64), self._key())
        self._pinned[atoms] = pinned
        return atoms.reshape(shape)

    def tie(self, left: IntArray, right: IntArray) -> None:
        """Say that ``left[p]`` and ``right[p]`` only move together, for every position p."""
        self._ties.append((left.ravel(), right.ravel(), self._key()))

    def mark(self, atoms: IntArray, places: IntArray) -> None:
        """Say that ``atoms[p]`` is used at ``places[p]``, which cannot move: atoms of other places cannot swap with it.

        An atom that occurs several times is marked as often.
        """
        np.add.at(self._colour, atoms.ravel(), _mix(places.ravel().astype(np.uint64), self._key()))

    def pin(self, atoms: IntArray) -> None:
        """Say that these atoms, and whatever is tied to them now or later, cannot move."""
        self._pinned[atoms.ravel()] = True

    def pinned(self, atoms: IntArray) -> bool:
        """Whether every one of these atoms is pinned itself."""
        return bool(self._pinned[atoms].all())

    def symmetry(self) -> Symmetry:
        """Decide what may swap with what, from everything said so far."""
        colour = self._refined()
        count = self._count
        left = np.concatenate([tie[0] for tie in self._ties] or [np.zeros(0, np.int64)])
        right = np.concatenate([tie[1] for tie in self._ties] or [np.zeros(0, np.int64)])
        links = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(count, count))
        components, labels = connected_components(links, directed=False)
        component: IntArray = labels.astype(np.int64)

        stuck = np.zeros(components, np.bool_)
        stuck[component[self._pinned[:count]]] = True
        order = np.lexsort((colour, component))
        twice = (component[order][1:] == component[order][:-1]) & (colour[order][1:] == colour[order][:-1])
        stuck[component[order][1:][twice]] = True

        signature = np.zeros(components, np.uint64)
        np.add.at(signature, component, _mix(colour, 0))
        _, kind = np.unique(signature, return_inverse=True)
        kind = np.where(stuck, -1, kind).astype(np.int64)
        return Symmetry(component, colour, kind[component])

    def _refined(self) -> Colours:
        """Colours split until every atom of one colour has the same neighbours, by colour and kind of tie.

        The ties were recorded in graph order, so one sweep forward and one back carries a difference
        through the whole graph; a second pair is rarely more than the proof that nothing changes.
        """
        colour = self._colour[: self._count].copy()
        distinct = 0
        while (now := len(np.unique(colour))) != distinct:
            distinct = now
            for left, right, key in [*self._ties, *reversed(self._ties)]:
                to_left, to_right = _mix(colour[right], 2 * key), _mix(colour[left], 2 * key + 1)
                np.add.at(colour, left, to_left)
                np.add.at(colour, right, to_right)
        return colour

    def _key(self) -> int:
        self._keys += 1
        return self._keys


def _mix(values: Colours, key: int) -> Colours:
    """Hash each value together with ``key``: splitmix64 (Steele, Lea and Flood, 2014), twice.

    Once would not do: the colour of an atom is a sum of hashes, and the second round keeps a sum from
    being predictable from the key alone.
    """
    for salt in (key, 0):
        values = values + np.uint64((salt + 1) * 0x9E3779B97F4A7C15 % 2**64)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        values = values ^ (values >> np.uint64(31))
    return values
