"""What the TensorRT bindings offer: the real wheels, imported without TensorRT, against a C library that is empty.

The bindings need nine functions of three libraries (/specs/deployment.md, 1). A stub that has them is enough to
import the module; its classes, methods and enums, with the signatures in their docstrings, are written out as JSON.
"""

import ast
import inspect
import json
import keyword
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

WHEELS = Path(__file__).parent.parent / "build" / "tensorrt-bindings"
VERSIONS = ("10.16.1.11", "11.4.0.106")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = """
createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL createNvOnnxParser_INTERNAL
createNvOnnxParserRefitter_INTERNAL getNvOnnxParserVersion getPluginRegistry getBuilderPluginRegistry
initLibNvInferPlugins
"""

DUMP = """
import inspect, json, sys
import tensorrt_bindings as trt

def describe(value):
    if isinstance(value, property):
        return {"kind": "property", "doc": value.fget.__doc__ or "", "settable": value.fset is not None}
    if callable(value) and not isinstance(value, type):
        return {"kind": "method", "doc": value.__doc__ or ""}
    return {"kind": "value", "doc": type(value).__name__}

def surface(cls):
    members = {name: describe(getattr(cls, name)) for name in dir(cls) if not name.startswith("__")}
    members["__init__"] = {"kind": "method", "doc": cls.__init__.__doc__ or ""}
    for name, value in vars(cls).items():
        if isinstance(value, type):
            members[name] = {"kind": "class", "doc": name}
            classes[name] = surface(value)
    bases = [base.__name__ for base in cls.__mro__[1:] if base.__module__.startswith("tensorrt")]
    enum = {name: int(value) for name, value in getattr(cls, "__members__", {}).items()}
    return {"members": members, "bases": bases, "enum": enum}

classes = {}
classes |= {name: surface(value) for name, value in vars(trt).items() if isinstance(value, type)}
functions = {n: v.__doc__ or "" for n, v in vars(trt).items() if callable(v) and not isinstance(v, type)}
json.dump({"version": trt.__version__, "classes": classes, "functions": functions}, sys.stdout)
"""


@dataclass(frozen=True)
class Method:
    """A documented signature: how it is called, and the name of the type it returns."""

    signature: inspect.Signature
    returns: str


@dataclass(frozen=True)
class Property:
    returns: str
    settable: bool


@dataclass(frozen=True)
class Class:
    name: str
    bases: tuple[str, ...]
    methods: dict[str, list[Method]] = field(default_factory=dict)
    properties: dict[str, Property] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    enum: dict[str, int] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.methods or name in self.properties or name in self.values or name in self.enum


@dataclass(frozen=True)
class Surface:
    version: str
    classes: dict[str, Class]
    functions: dict[str, list[Method]]


def read_surface(version: str, folder: Path) -> Surface:
    """Import the bindings of a version in a process of their own; ``folder`` gets the stub."""
    stub = folder / "stub.c"
    stub.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS.split()))
    for library in LIBRARIES:
        file = folder / f"lib{library}.so.{version.partition('.')[0]}"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", file, stub], check=True)
    where = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(WHEELS / version)}
    done = subprocess.run([sys.executable, "-c", DUMP], env={**os.environ, **where}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"] == version
    classes = {name: _class(name, described) for name, described in found["classes"].items()}
    functions = {name: signatures(doc) for name, doc in found["functions"].items()}
    return Surface(version, classes, functions)


def _class(name: str, described: dict) -> Class:
    members = described["members"]
    of_kind = {kind: {n: m for n, m in members.items() if m["kind"] == kind} for kind in ("method", "property")}
    return Class(
        name,
        tuple(described["bases"]),
        {n: signatures(m["doc"]) for n, m in of_kind["method"].items()},
        {n: Property(type_name(m["doc"].rpartition("->")[2]), m["settable"]) for n, m in of_kind["property"].items()},
        {n: m["doc"] for n, m in members.items() if m["kind"] in ("value", "class")},
        described["enum"],
    )


def signatures(doc: str) -> list[Method]:
    """The signatures in a docstring of pybind11: on its first line, or numbered where there are several."""
    lines = doc.strip().splitlines()
    if lines and "(*args, **kwargs)" in lines[0]:
        lines = [line.partition(". ")[2] for line in lines[1:] if re.match(r"\d+\. \w+\(", line)]
    else:
        lines = lines[:1]
    return [method for line in lines if (method := _signature(line)) is not None]


def _signature(line: str) -> Method | None:
    found = re.fullmatch(r"\w+\((.*)\) -> (.+)", line.strip())
    if found is None:
        return None
    parameters = []
    for part in _split(found[1]):
        name, _, rest = part.partition(":")
        default = inspect.Parameter.empty if " = " not in rest else rest.rpartition(" = ")[2]
        name = name.strip()
        parameters.append(
            (name if name.isidentifier() and not keyword.iskeyword(name) else f"_{len(parameters)}", default)
        )
    # A default in front of a parameter without one would be no Python; the bindings have one such method.
    needed = [p for p in parameters if p[1] is inspect.Parameter.empty]
    ordered = needed + [p for p in parameters if p[1] is not inspect.Parameter.empty]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return Method(
        inspect.Signature([inspect.Parameter(name, kind, default=default) for name, default in ordered]),
        type_name(found[2]),
    )


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(<{") - (letter in "])>}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def type_name(text: str) -> str:
    """``tensorrt_bindings.tensorrt.Builder`` and ``nvinfer1::IBuilder`` are Builder; ``list[...]`` stays a list."""
    text = text.strip()
    if text.startswith("list["):
        return f"list[{type_name(text[5:-1])}]"
    name = re.split(r"\.|::", text)[-1]
    return {"IParserError": "ParserError", "IBuilder": "Builder"}.get(name, name)


def sources() -> list[Path]:
    """The files of the package that use TensorRT."""
    folder = Path(__file__).parent.parent / "runtime" / "tensorrt"
    return [file for file in sorted(folder.glob("*.py")) if "tensorrt as trt" in file.read_text()]


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())
