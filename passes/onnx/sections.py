"""What the weights of an ONNX model are fitted to, and the order in which they can be: section by section."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..parts import Parts
from ..recipe import Recipe
from .attended import attention_of
from .flow import Flow
from .linears import Linear
from .parts import parts_of
from .view import Model


@dataclass(frozen=True)
class Reading:
    """What a weight is fitted to: the rows of ``x``, or what an attention makes of them.

    Attributes:
        x: the tensor that a linear reads.
        features: entries on its last axis.
        attention: the tensor that says what each query gives to each token; "" for the rows of ``x`` themselves.
    """

    x: str
    features: int
    attention: str = ""

    @property
    def plain(self) -> "Reading":
        """The rows themselves."""
        return Reading(self.x, self.features)

    @property
    def tensors(self) -> tuple[str, ...]:
        """What has to be observed."""
        return (self.x, self.attention) if self.attention else (self.x,)


@dataclass(frozen=True)
class Shared:
    """A weight and all linears that read it.

    Attributes:
        linears: those linears; one, for most weights.
        parts: the linears that it is made of.
        fitted_to: what it is fitted to, once for every different input.
    """

    linears: tuple[Linear, ...]
    parts: Parts
    fitted_to: tuple[Reading, ...]

    @property
    def name(self) -> str:
        """The tensor that holds it."""
        return self.linears[0].weight.name

    @property
    def path(self) -> str:
        """The first linear's name."""
        return self.linears[0].path

    @property
    def inputs(self) -> tuple[Reading, ...]:
        """What its linears read, once each."""
        return tuple(dict.fromkeys(reading.plain for reading in self.fitted_to))


@dataclass(frozen=True)
class Section:
    """Weights that are fitted to the same, and where in the model that is.

    Attributes:
        begin: the step (`flow.Step`) of the first of their products.
        known: how many steps must have run before all of it is there.
        weights: the weights.
    """

    begin: int
    known: int
    weights: tuple[Shared, ...]

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What has to be observed for it."""
        every = [x for weight in self.weights for x in (*weight.inputs, *weight.fitted_to)]
        return tuple(dict.fromkeys(every))


def shared_weights(model: Model, linears: Sequence[Linear], recipe: Recipe) -> dict[str, Shared]:
    """The weights of some linears by name, with everything that reads them."""
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(linear.weight.name, []).append(linear)
    found = {}
    fitted = recipe.update != "none" or sweeps(recipe)
    for name, group in groups.items():
        readings = []
        for linear in group:
            attention = attention_of(model, linear) if fitted and recipe.hessian == "attended" else ""
            readings.append(Reading(linear.x.name, linear.weight.shape[1], attention))
        found[name] = Shared(tuple(group), parts_of(model, group), tuple(dict.fromkeys(readings)))
    return found


def sections(flow: Flow, weights: Iterable[Shared]) -> list[Section]:
    """The weights in the order in which they are pruned: one section for all that are fitted to the same.

    A section's inputs are known when everything in front of it is pruned, unless one of its weights is read again
    further on, or is fitted to an attention behind it: then the steps up to there run with the section's own weights,
    and those behind them, as they were.
    """
    groups: dict[tuple[Reading, ...], list[Shared]] = {}
    for weight in weights:
        groups.setdefault(weight.fitted_to, []).append(weight)
    found = []
    for readings, alike in groups.items():
        begin = min(flow.position(linear) for weight in alike for linear in weight.linears)
        known = max(flow.known_after(name) for reading in readings for name in reading.tensors)
        found.append(Section(begin, known, tuple(alike)))
    return sorted(found, key=lambda section: section.begin)


def sweeps(recipe: Recipe) -> bool:
    """Whether weights are put on a grid by what their inputs are."""
    return recipe.quantise is not None and recipe.quantise.method != "rtn"
