"""A TensorRT to run against: every class, method and property of the bindings, recorded, and nothing else.

Methods take what is documented and return a value of the documented type; a test scripts what matters to it.
"""

import enum
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from trt_surface import Class, Surface

PLAIN = {"bool": True, "int": 0, "float": 0.0, "str": "", "None": None, "object": None}


class Double(ModuleType):
    """The module.

    Attributes:
        calls: what was called or set, in order: its name and the arguments.
        script: by ``Class.member``, what it returns instead: a value, or a function of the object and the arguments.
    """

    def __init__(self, surface: Surface, script: dict[str, Any]) -> None:
        super().__init__("tensorrt")
        self.__version__ = surface.version
        self.__spec__ = ModuleSpec("tensorrt", None)  # or importlib could not tell that it is there
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.script = script
        self._surface = surface
        for name, described in surface.classes.items():
            if described.enum:
                setattr(self, name, _enum(name, described.enum))
        for name in surface.classes:
            self._class(name)
        for name, methods in surface.functions.items():
            setattr(self, name, _call(self, name, methods, bound=False))

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of every call of ``Class.member``."""
        return [arguments for called, arguments in self.calls if called == name]

    def value(self, returns: str) -> Any:
        """A value of a documented type."""
        if returns in PLAIN:
            return PLAIN[returns]
        if returns.startswith("list["):
            return []
        if returns not in self._surface.classes:
            raise AssertionError(f"what does {returns} look like? a test must script it")
        cls = getattr(self, returns)
        return next(iter(cls)) if issubclass(cls, enum.Enum) else _made(cls)

    def _class(self, name: str) -> type:
        if name in vars(self):
            return vars(self)[name]
        described = self._surface.classes[name]
        bases = tuple(self._class(base) for base in described.bases[:1]) or (_Object,)
        cls = type(name, bases, {"__init__": _call(self, name, described.methods["__init__"], bound=True)})
        for member, methods in described.methods.items():
            if not member.startswith("_") and not any(member in vars(base) for base in cls.__mro__[1:-1]):
                setattr(cls, member, _call(self, f"{name}.{member}", methods, bound=True))
        for member in described.properties:
            setattr(cls, member, _property(self, described, member))
        for member, kind in described.values.items():
            holder = vars(self).get(kind)
            setattr(cls, member, holder if kind == member else holder[member] if holder is not None else None)
        if name == "IHostMemory":  # the one class that is a buffer
            cls = type(name, (bytes,), {"nbytes": property(len)})
        cls._double = name
        setattr(self, name, cls)
        return cls


class _Object:
    """Takes no attribute that is not documented, as classes of pybind11; classes derived from it do."""

    def __setattr__(self, name: str, value: Any) -> None:
        documented = type(self).__dict__.get("_double") is not None
        if documented and name != "__class__" and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        super().__setattr__(name, value)


def _made(cls: type) -> Any:
    """An object that TensorRT made, without calling a constructor."""
    return cls.__new__(cls)


def _enum(name: str, members: dict[str, int]) -> Any:
    made = enum.Enum(name, members)
    made.__int__ = lambda self: self.value
    return made


def _call(double: Double, name: str, methods: list[Any], *, bound: bool) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        for method in methods:
            try:
                method.signature.bind(*arguments, **named)
            except TypeError:
                continue
            double.calls.append((name, (*arguments[bound:], *named.values())))
            if name in double.script:
                scripted = double.script[name]
                return scripted(*arguments, **named) if callable(scripted) else scripted
            return None if name in double._surface.classes else double.value(method.returns)
        raise TypeError(f"{name}(): incompatible function arguments {arguments} {named}")

    return call


def _property(double: Double, described: Class, member: str) -> property:
    name = f"{described.name}.{member}"

    def read(self: Any) -> Any:
        if name in double.script:
            scripted = double.script[name]
            return scripted(self) if callable(scripted) else scripted
        return double.value(described.properties[member].returns)

    def write(self: Any, value: Any) -> None:
        double.calls.append((name, (value,)))

    return property(read, write if described.properties[member].settable else None)
