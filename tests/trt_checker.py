"""Check the uses of TensorRT in a source file against what the bindings document, by walking its syntax tree.

A small inference: it knows the types of what TensorRT returns from the documented signatures, of parameters from their
annotations, and of attributes of ``self`` from what is assigned to them. What has a type is checked: that the name
exists, that arguments bind, that a property can be set. What has none but is called like something of TensorRT is a
complaint too, so nothing gets past by not being understood.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trt_surface import Class, Method, Surface

MODULE = "module trt"


@dataclass(frozen=True)
class Instance:
    """A value of a class of TensorRT, or of a subclass in the file, or a list of them."""

    name: str


@dataclass(frozen=True)
class Type:
    name: str


@dataclass(frozen=True)
class Bound:
    """Something that can be called."""

    name: str
    methods: tuple[Method, ...]
    bound: bool


@dataclass
class Checker:
    """See ``complaints``.

    Attributes:
        surface: what the bindings offer.
        complaints: what is wrong, each with its line.
        uses: names of TensorRT that were found and exist, as ``Class.member``.
    """

    surface: Surface
    complaints: list[str] = field(default_factory=list)
    uses: set[str] = field(default_factory=set)
    own: dict[str, ast.ClassDef] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False

    def check(self, tree: ast.Module) -> "Checker":
        """Walk a file: once to learn the types of attributes, once to complain."""
        self.own = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        for self.quiet in (True, False):
            self.run(tree.body, {"trt": MODULE, **{name: Type(name) for name in self.own}})
        return self

    def complain(self, node: ast.AST, text: str) -> None:
        if not self.quiet:
            self.complaints.append(f"line {getattr(node, 'lineno', 0)}: {text}")

    def run(self, body: list[ast.stmt], known: dict[str, Any]) -> None:
        for statement in body:
            self.statement(statement, known)

    def statement(self, node: ast.stmt, known: dict[str, Any]) -> None:
        if isinstance(node, ast.ClassDef):
            self.klass(node, known)
        elif isinstance(node, ast.FunctionDef):
            inner = dict(known)
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                inner[argument.arg] = self.annotated(argument.annotation, known)
            self.run(node.body, inner)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            value = self.infer(node.value, known) if node.value is not None else None
            if isinstance(node, ast.AnnAssign) and not self.is_described(value):
                value = self.annotated(node.annotation, known)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self.assign(target, value, known)
        elif isinstance(node, ast.For):
            self.assign(node.target, self.element(self.infer(node.iter, known)), known)
            self.run([*node.body, *node.orelse], known)
        else:
            for name, value in ast.iter_fields(node):
                if name in ("body", "orelse", "finalbody"):
                    self.run(value, known)
                elif name == "handlers":
                    for handler in value:
                        self.run(handler.body, known)
                elif name == "items":
                    for item in value:
                        self.infer(item.context_expr, known)
                elif isinstance(value, ast.expr):
                    self.infer(value, known)

    def is_described(self, value: Any) -> bool:
        """Whether a value has a type that is known; the bindings do not say what ``get_plugin_registry`` returns."""
        names = (*self.surface.classes, *self.own)
        return value is not None and not (
            isinstance(value, Instance) and value.name.removeprefix("list[").rstrip("]") not in names
        )

    def klass(self, node: ast.ClassDef, known: dict[str, Any]) -> None:
        """A class of the file; what it overrides must exist and be called the same way."""
        base = self.base(node.name)
        for statement in node.body:
            if not isinstance(statement, ast.FunctionDef):
                continue
            if base is not None and not statement.name.startswith("_"):
                self.override(statement, base)
            self.statement(_with_self(statement), {**known, "self": Instance(node.name)})

    def override(self, node: ast.FunctionDef, base: Class) -> None:
        documented = base.methods.get(node.name)
        if not documented:
            self.complain(node, f"{base.name} has no {node.name} to override")
            return
        self.uses.add(f"{base.name}.{node.name}")
        names = [argument.arg for argument in node.args.args]
        if not any(names == list(method.signature.parameters) for method in documented):
            self.complain(node, f"{base.name}.{node.name} is documented with other arguments than {names}")

    def base(self, name: str) -> Class | None:
        """The class of TensorRT that a class of the file is derived from."""
        for base in self.own[name].bases:
            if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name) and base.value.id == "trt":
                return self.surface.classes.get(base.attr)
            if isinstance(base, ast.Name) and base.id in self.own:
                return self.base(base.id)
        return None

    def annotated(self, annotation: ast.expr | None, known: dict[str, Any]) -> Any:
        """The instance that an annotation ``trt.X`` or ``list[trt.X]`` means."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        if isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", "") == "list":
            inner = self.annotated(annotation.slice, known)
            return Instance(f"list[{inner.name}]") if isinstance(inner, Instance) else None
        if isinstance(annotation, ast.Attribute | ast.Name):
            found = self.infer(annotation, known)
            return Instance(found.name) if isinstance(found, Type) else None
        return None

    def assign(self, target: ast.expr, value: Any, known: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            known[target.id] = value
        elif isinstance(target, ast.Tuple):
            for element in target.elts:
                self.assign(element, None, known)
        elif isinstance(target, ast.Attribute):
            owner = self.infer(target.value, known)
            if target.attr == "__class__" and isinstance(target.value, ast.Name) and isinstance(value, Type):
                known[target.value.id] = Instance(value.name)
            elif isinstance(owner, Instance) and owner.name in self.own:
                if value is not None:
                    self.attributes[f"{owner.name}.{target.attr}"] = value
            elif isinstance(owner, Instance) and owner.name in self.surface.classes:
                self.settable(target, owner.name)

    def settable(self, target: ast.Attribute, name: str) -> None:
        found = self.surface.classes[name].properties.get(target.attr)
        if found is None:
            self.complain(target, f"{name} has no property {target.attr}")
        elif not found.settable:
            self.complain(target, f"{name}.{target.attr} cannot be set")
        else:
            self.uses.add(f"{name}.{target.attr}")

    def infer(self, node: ast.expr | None, known: dict[str, Any]) -> Any:
        """The type of an expression, or None; everything inside is checked on the way."""
        if node is None:
            return None
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.attribute(node, self.infer(node.value, known))
        if isinstance(node, ast.Call):
            return self.call(node, known)
        if isinstance(node, ast.Subscript):
            self.infer(node.slice, known)
            return self.element(self.infer(node.value, known))
        if isinstance(node, ast.NamedExpr):
            known[node.target.id] = self.infer(node.value, known)
            return known[node.target.id]
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            return self.comprehension(node, dict(known))
        if isinstance(node, ast.Lambda):
            self.infer(node.body, dict(known))
            return None
        for child in _expressions(node):
            self.infer(child, known)
        return None

    def comprehension(self, node: Any, known: dict[str, Any]) -> Any:
        for generator in node.generators:
            self.assign(generator.target, self.element(self.infer(generator.iter, known)), known)
            for condition in generator.ifs:
                self.infer(condition, known)
        if isinstance(node, ast.DictComp):
            self.infer(node.key, known)
            self.infer(node.value, known)
            return None
        element = self.infer(node.elt, known)
        return Instance(f"list[{element.name}]") if isinstance(element, Instance) else None

    def attribute(self, node: ast.Attribute, owner: Any) -> Any:
        if owner == MODULE:
            return self.member_of_module(node)
        if isinstance(owner, Instance | Type) and owner.name in self.own:
            return self.member_of_own(node, owner)
        if not isinstance(owner, Instance | Type) or owner.name not in self.surface.classes:
            if self.looks_like_tensorrt(node.attr, owner):
                self.complain(node, f"{node.attr} is used on something of unknown type")
            return None
        return self.member(node, self.surface.classes[owner.name], instance=isinstance(owner, Instance))

    def looks_like_tensorrt(self, name: str, owner: Any) -> bool:
        return (
            owner is None and "_" in name.strip("_") and any(name in c.methods for c in self.surface.classes.values())
        )

    def member_of_module(self, node: ast.Attribute) -> Any:
        if node.attr in self.surface.classes:
            self.uses.add(node.attr)
            return Type(node.attr)
        if node.attr in self.surface.functions:
            self.uses.add(node.attr)
            return Bound(node.attr, tuple(self.surface.functions[node.attr]), bound=False)
        if node.attr != "__version__":
            self.complain(node, f"tensorrt has no {node.attr}")
        return None

    def member_of_own(self, node: ast.Attribute, owner: Instance | Type) -> Any:
        if f"{owner.name}.{node.attr}" in self.attributes:
            return self.attributes[f"{owner.name}.{node.attr}"]
        for statement in self.own[owner.name].body:
            if isinstance(statement, ast.FunctionDef) and statement.name == node.attr:
                returned = self.annotated(statement.returns, {"trt": MODULE})
                return Bound("", (), bound=True) if returned is None else Type(returned.name)
        base = self.base(owner.name)
        if base is not None and node.attr in base:
            return self.member(node, base, instance=isinstance(owner, Instance))
        return None

    def member(self, node: ast.Attribute, owner: Class, *, instance: bool) -> Any:
        name = node.attr
        if name.startswith("__"):
            return None
        if name not in owner:
            self.complain(node, f"{owner.name} has no {name}")
            return None
        self.uses.add(f"{owner.name}.{name}")
        if name in owner.methods:
            return Bound(f"{owner.name}.{name}", tuple(owner.methods[name]), bound=instance)
        if name in owner.properties:
            return Instance(owner.properties[name].returns)
        kind = owner.values.get(name, owner.name)
        return Type(name) if kind == name else Instance(kind)

    def call(self, node: ast.Call, known: dict[str, Any]) -> Any:
        function = self.infer(node.func, known)
        starred = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.infer(argument, known)
        if isinstance(function, Type):
            documented = self.surface.classes.get(function.name)
            if documented is not None and not isinstance(node.func, ast.Attribute):
                return Instance(function.name)
            if documented is not None and self.is_constructor(node.func, function):
                self.bind(node, Bound(function.name, tuple(documented.methods["__init__"]), bound=True), starred)
            return Instance(function.name)
        if isinstance(function, Bound) and function.methods:
            returned = self.bind(node, function, starred)
            return Instance(returned) if returned else None
        return None

    def is_constructor(self, node: ast.Attribute, function: Type) -> bool:
        return isinstance(node.value, ast.Name) and node.value.id == "trt" and node.attr == function.name

    def bind(self, node: ast.Call, function: Bound, starred: bool) -> str:
        """The name of the type that the first signature returns which takes these arguments."""
        for method in function.methods:
            arguments = [None] * (len(node.args) + function.bound)
            try:
                if not starred:
                    method.signature.bind(*arguments, **{keyword.arg: None for keyword in node.keywords})
            except TypeError:
                continue
            return method.returns
        given = [ast.unparse(argument) for argument in (*node.args, *node.keywords)]
        self.complain(node, f"{function.name} does not take ({', '.join(given)})")
        return ""

    def element(self, value: Any) -> Any:
        """What a list holds."""
        if isinstance(value, Instance) and value.name.startswith("list["):
            return Instance(value.name[5:-1])
        return None


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child
        elif not isinstance(child, ast.stmt):
            yield from _expressions(child)


def _with_self(node: ast.FunctionDef) -> ast.FunctionDef:
    """The function without its first parameter, whose type is known."""
    arguments = ast.arguments(**{**vars(node.args), "args": node.args.args[1:]})
    return ast.FunctionDef(**{**vars(node), "args": arguments})
