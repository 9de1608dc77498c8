"""Problems: the arguments of a family's operator, as a NamedTuple whose annotations give the operator's schema.

A problem stays whole in Python. It is flat across torch's border, whose operators take tensors, numbers and strings. A
field that is itself a problem is flattened in its place, and its fields' names get its name in front. A nested problem
that is None has None in all of its fields.
"""

import types
import typing
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SCHEMA_TYPES = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType"}


class _Field(NamedTuple):
    name: str
    schema_type: str | None  # None: a nested problem
    nested: "Fields | None"
    optional: bool


class Fields:
    """The fields of a class of problems, read from its annotations once, since a compiler cannot trace that."""

    def __init__(self, problem: type):
        self.problem = problem
        hints = typing.get_type_hints(problem)
        self.fields = tuple(_field(name, hints[name]) for name in problem._fields)
        self.flat = tuple(
            (f"{field.name}_{name}" if field.nested else name, schema_type + "?" * (optional or field.optional))
            for field in self.fields
            for name, schema_type, optional in _leaves(field)
        )

    @property
    def schema(self) -> str:
        """The operator's arguments: "Tensor student, Tensor? options_labels, ..."."""
        return ", ".join(f"{schema_type} {name}" for name, schema_type in self.flat)

    def __len__(self) -> int:
        return len(self.flat)

    def flatten(self, problem) -> list:
        """The values in the order of the schema."""
        values = []
        for field, value in zip(self.fields, problem, strict=True):
            if field.nested is None:
                values.append(value)
            elif value is None:
                values.extend([None] * len(field.nested))
            else:
                values.extend(field.nested.flatten(value))
        return values

    def unflatten(self, values) -> Any:
        """The problem for which `flatten` gave these values."""
        parts, first = [], 0
        for field in self.fields:
            if field.nested is None:
                parts.append(values[first])
                first += 1
                continue
            own = values[first : first + len(field.nested)]
            first += len(field.nested)
            absent = field.optional and all(value is None for value in own)
            parts.append(None if absent else field.nested.unflatten(own))
        return self.problem(*parts)


def _field(name: str, hint) -> _Field:
    optional = isinstance(hint, types.UnionType)
    if optional:
        (hint,) = (choice for choice in typing.get_args(hint) if choice is not type(None))
    if hasattr(hint, "_fields"):
        return _Field(name, None, Fields(hint), optional)
    return _Field(name, _SCHEMA_TYPES[hint], None, optional)


def _leaves(field: _Field):
    """(name, schema type without its question mark, whether it may be None) of each flat value of a field."""
    if field.nested is None:
        return [(field.name, field.schema_type, False)]
    return [(name, kind.rstrip("?"), kind.endswith("?")) for name, kind in field.nested.flat]
