"""What a function reads besides its arguments: is it still the function that was compiled?

A compiled program holds the values that its function closed over when it was traced. They may
change: a variable that it shares with the function around it, a global, an attribute of the
object whose method it is, an entry of a list. `readings` lists all that a function can read by
such names, so that two lists, taken before and after, tell whether to trace it anew; `Kept` keeps
programs by it.

What it can't see: attributes read by a computed name (`getattr(self, name)`), and the insides
of installed packages, which are taken to stay as they are.
"""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import functools
import gc
import hashlib
import inspect
import os
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import jax
import numpy as np

_PLAIN = (str, bytes, int, type(None), type(Ellipsis), types.CodeType)
_INSTALLED = (
    os.path.dirname(os.path.abspath(__file__)) + os.sep,  # fnn itself
    *(sysconfig.get_paths()[p] + os.sep for p in ("stdlib", "purelib", "platlib")),
    "<frozen",
)
_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
_OTHERS = ("getitem", "getattr", "contains", "iter", "len", "bool", "neg", "pos", "abs", "invert")
# What code calls without its name: objects that are called, and operators. What is called may
# also wrap what is run.
_ALWAYS_READ = frozenset(
    {"__call__", "__wrapped__", "__jax_array__"}
    | {f"__{name}__" for name in (*_OTHERS, *_BINARY)}
    | {f"__r{name}__" for name in _BINARY}
)
# What a class has for a field of its objects, whose value stands in the object; methods of C.
_DESCRIPTORS = (
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    type(vars(collections.namedtuple("_", "field"))["field"]),
)


def readings(function: Any) -> list:
    """A list that is equal to an earlier one if the function still reads the same.

    It keeps alive none of what the function refers to. (An equal list may also come from
    another function with the same code.) Where something can't be looked at, it equals no other.
    """
    digests: dict[int, bytes] = {}
    names = _ALWAYS_READ
    try:
        while True:
            walk = _Walk(names, digests)
            walk.visit(function)
            # Of an object only what the code names is read, and all code must be known for that.
            if walk.names == names:
                return walk.entries
            names = frozenset(walk.names)
    except Exception:  # proxies that refuse, dicts that another thread changes, nesting too deep
        return [object()]


class _Walk:
    """One walk over what is reachable, as a flat list of entries."""

    def __init__(self, names: frozenset[str], digests: dict[int, bytes]):
        self.names = set(names)
        self.entries: list = []
        self._read = sorted(names)
        self._digests = digests
        self._seen: dict[int, tuple[int, Any]] = {}  # the object too: its id stays its own

    def visit(self, x: Any) -> None:
        if isinstance(x, _PLAIN):
            self.entries += (type(x), x)
            self._subclass(x)
            return
        if isinstance(x, (float, complex, np.generic)):
            self.entries += (type(x), repr(x))  # nan is itself, and -0.0 isn't 0.0
            return
        if id(x) in self._seen:
            self.entries += ("again", self._seen[id(x)][0])
            return
        self._seen[id(x)] = len(self._seen), x
        self.entries.append(type(x))
        for kind, visit in _VISITS:
            if isinstance(x, kind):
                visit(self, x)
                self._subclass(x)
                return
        self._object(x)

    def _subclass(self, x: Any) -> None:
        """What the user's class adds to the one of Python's that it derives from."""
        kind = type(x)
        if kind.__module__ != "builtins" and not _is_installed(sys.modules.get(kind.__module__)):
            self._named(getattr(x, "__dict__", {}))
            self.visit(kind)

    def _all(self, *parts: Any) -> None:
        self.entries.append(len(parts))
        for part in parts:
            self.visit(part)

    def _named(self, values: dict[str, Any]) -> None:
        """Those of the values whose names are read."""
        for name in self._read:
            if name in values:
                self.entries.append(name)
                self.visit(values[name])

    def _array(self, x: np.ndarray) -> None:
        if x.dtype == object:
            self._all(x.shape, *x.flat)
            return
        if id(x) not in self._digests:
            self._digests[id(x)] = hashlib.blake2b(np.ascontiguousarray(x).tobytes()).digest()
        self.entries += (x.shape, str(x.dtype), self._digests[id(x)])

    def _function(self, f: types.FunctionType) -> None:
        cells = [c.cell_contents for c in f.__closure__ or () if _is_filled(c)]
        self._all(f.__code__, f.__defaults__, f.__kwdefaults__, *cells)
        self._named(f.__dict__)
        if not f.__code__.co_filename.startswith(_INSTALLED):
            read = set(_names(f.__code__))
            self.names |= read
            for name in sorted(read & f.__globals__.keys()):
                self.entries.append(name)
                self.visit(f.__globals__[name])

    def _module(self, x: types.ModuleType) -> None:
        if not _is_installed(x):
            self._named(vars(x))

    def _class(self, x: type) -> None:
        self.entries.append(_Same(x))
        for base in x.__mro__:
            if not _is_installed(sys.modules.get(base.__module__)):
                self._named(dict(vars(base)))

    def _object(self, x: Any) -> None:
        attributes = dict(getattr(x, "__dict__", {}))
        slots = {
            name: getattr(x, name)
            for base in type(x).__mro__
            for name in _slots(base)
            if hasattr(x, name)
        }
        if not _Same.can_tell(x):
            if not slots:
                self.entries.append(object())  # nothing to go by: never equal to an earlier one
            self._all(*slots, *slots.values())
        else:
            self.entries.append(_Same(x))
        self._named(attributes | slots)
        if dataclasses.is_dataclass(x) and _is_installed(sys.modules.get(type(x).__module__)):
            # The names in its methods aren't known: it may read any of its fields.
            fields = [f.name for f in dataclasses.fields(x) if hasattr(x, f.name)]
            self._all(*[getattr(x, name) for name in fields])
        self._class(type(x))


_VISITS: tuple[tuple[Any, Any], ...] = (
    (jax.Array, lambda walk, x: walk.entries.append(_Same(x))),
    (np.ndarray, _Walk._array),
    (types.FunctionType, _Walk._function),
    (types.MethodType, lambda walk, x: walk._all(x.__func__, x.__self__)),
    (types.BuiltinFunctionType, lambda walk, x: walk._all(x.__name__, x.__self__)),
    (types.ModuleType, _Walk._module),
    (functools.partial, lambda walk, x: walk._all(x.func, x.args, x.keywords)),
    (property, lambda walk, x: walk._all(x.fget)),
    ((staticmethod, classmethod), lambda walk, x: walk._all(x.__func__)),
    (type, _Walk._class),
    ((dict, types.MappingProxyType), lambda walk, x: walk._all(*x.keys(), *x.values())),
    ((tuple, list, set, frozenset, collections.deque), lambda walk, x: walk._all(*x)),
    ((bytearray, array.array), lambda walk, x: walk.entries.append(bytes(x))),
    (slice, lambda walk, x: walk._all(x.start, x.stop, x.step)),
    (_DESCRIPTORS, lambda walk, x: None),
)


class _Same:
    """An object to compare by identity, without keeping it alive."""

    def __init__(self, x: Any):
        try:
            self._ref: Any = weakref.ref(x)
        except TypeError:  # it refers to no other object, and so not to the function either
            self._ref = lambda: x

    @staticmethod
    def can_tell(x: Any) -> bool:
        """Can it be held weakly, or else without holding anything else?"""
        return type(x).__weakrefoffset__ != 0 or not gc.is_tracked(x)

    def __eq__(self, other: object) -> bool:
        mine = self._ref()
        return isinstance(other, _Same) and mine is not None and mine is other._ref()

    __hash__ = None  # type: ignore[assignment]


def _names(code: types.CodeType) -> Iterator[str]:
    """The globals and attributes that code, and the functions inside it, name."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_installed(module: Any) -> bool:
    file = getattr(module, "__file__", None) or ""
    return (
        file.startswith(_INSTALLED) or getattr(module, "__name__", "") in sys.builtin_module_names
    )


# ------------------------------------------------------------------------------- what is kept by it

T = TypeVar("T")


class Kept(Generic[T]):
    """What was made of functions, as long as they live and read the same.

    They are found by their identity, and not kept alive; so what is kept must not hold them.
    """

    def __init__(self) -> None:
        self._found: dict[Any, tuple[T, list[list], list]] = {}

    def find(self, functions: tuple, *more: Any) -> T | None:
        """What was kept for these functions, and for more that can be hashed."""
        found = self._found.get(_name(functions, more))
        return found[0] if found and found[1] == list(map(readings, functions)) else None

    @contextlib.contextmanager
    def found_or(self, make: Callable[..., T], *functions: Any) -> Iterator[T]:
        """What was kept for these functions, or else is made of references to them, for a use.

        Args:
            make: called with a function for each, which returns it. What it makes has a list
                `traces`, which grows with each program that is traced.
        """
        made: Any = self.find(functions) or make(*map(_weakly, functions))
        before = len(made.traces)
        yield made
        if len(made.traces) > before:  # what they read now is what was traced
            with contextlib.suppress(TypeError):  # there are no weak references to one of them
                self.keep(functions, made=made)

    def keep(self, functions: tuple, *more: Any, made: T) -> None:
        """Keep it from here on, for functions that read what they read now.

        Raises:
            TypeError: there are no weak references to a function.
        """
        name = _name(functions, more)
        gone = lambda _: self._found.pop(name, None)
        references = [reference(f, gone) for f in functions]
        self._found[name] = made, list(map(readings, functions)), references


def reference(function: Any, gone: Callable | None = None) -> Any:
    """A weak reference, also to a method.

    Raises:
        TypeError: there are none to it.
    """
    refer = weakref.WeakMethod if inspect.ismethod(function) else weakref.ref
    return refer(function, gone)


def _weakly(function: Any) -> Callable[[], Any]:
    """What returns the function, and doesn't keep it alive where that can be."""
    try:
        return reference(function)
    except TypeError:
        return lambda: function


def _name(functions: tuple, more: tuple) -> tuple:
    def of(f):
        return (id(f.__self__), id(f.__func__)) if inspect.ismethod(f) else id(f)

    return (*map(of, functions), *more)
