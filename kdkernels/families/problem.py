"""Problems: the arguments of a family's operator, as a NamedTuple whose annotations give the operator's schema.

A problem stays whole in Python. It is flat across torch's border, whose operators take tensors, numbers and strings. A
field that is itself a problem is flattened in its place, and its fields' names get its name in front. A nested problem
that is None has None in all of its fields.
"""

import types
import typing
from typing import Any

import torch
from torch import Tensor

_SCHEMA_TYPES = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType"}


class Fields:
    """The fields of a class of problems, read from its annotations once, since a compiler cannot trace that."""

    def __init__(self, problem: type):
        self.problem = problem
        self.flat = []  # (name, schema type) of each value
        self.nested = []  # (place, fields, optional) of each nested problem
        hints = typing.get_type_hints(problem)
        for place, name in enumerate(problem._fields):
            kind, optional = _without_none(hints[name])
            own = [("", _SCHEMA_TYPES.get(kind))]
            if hasattr(kind, "_fields"):
                fields = Fields(kind)
                self.nested.append((place, fields, optional))
                own = fields.flat
            for part, schema_type in own:
                flat_name = f"{name}_{part}" if part else name
                self.flat.append((flat_name, schema_type.rstrip("?") + "?" if optional else schema_type))

    @property
    def schema(self) -> str:
        """The operator's arguments: "Tensor student, Tensor? options_labels, ..."."""
        return ", ".join(f"{schema_type} {name}" for name, schema_type in self.flat)

    def __len__(self) -> int:
        return len(self.flat)

    def flatten(self, problem) -> list:
        """The values in the order of the schema."""
        values = list(problem)
        for place, fields, _ in reversed(self.nested):  # the last first, so that the others keep their places
            value = values[place]
            values[place : place + 1] = [None] * len(fields) if value is None else fields.flatten(value)
        return values

    def unflatten(self, values) -> Any:
        """The problem for which `flatten` gave these values."""
        values = list(values)
        for place, fields, optional in self.nested:
            own = slice(place, place + len(fields))
            absent = optional and all(value is None for value in values[own])
            values[own] = [None if absent else fields.unflatten(values[own])]
        return self.problem(*values)


def _without_none(hint) -> tuple[Any, bool]:
    """The type of an annotation, and whether the value may be None."""
    if not isinstance(hint, types.UnionType):
        return hint, False
    (kind,) = (choice for choice in typing.get_args(hint) if choice is not type(None))
    return kind, True
