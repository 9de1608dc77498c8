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
        hints = typing.get_type_hints(problem)
        kinds = [_without_none(hints[name]) for name in problem._fields]
        self.nested = [Fields(kind) if hasattr(kind, "_fields") else None for kind, _ in kinds]
        self.optional = [optional for _, optional in kinds]
        self.flat = []  # (name, schema type) of each value
        self.places = []  # where a field's values begin and end
        for name, nested, (kind, optional) in zip(problem._fields, self.nested, kinds, strict=True):
            own = [("", _SCHEMA_TYPES.get(kind))] if nested is None else nested.flat
            self.places.append((len(self.flat), len(self.flat) + len(own)))
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
        values = []
        for nested, value in zip(self.nested, problem, strict=True):
            if nested is None:
                values.append(value)
            else:
                values += [None] * len(nested) if value is None else nested.flatten(value)
        return values

    def unflatten(self, values) -> Any:
        """The problem for which `flatten` gave these values."""
        parts = []
        for nested, optional, (first, end) in zip(self.nested, self.optional, self.places, strict=True):
            if nested is None:
                parts.append(values[first])
            elif optional and all(value is None for value in values[first:end]):
                parts.append(None)
            else:
                parts.append(nested.unflatten(values[first:end]))
        return self.problem(*parts)


def _without_none(hint) -> tuple[Any, bool]:
    """The type of an annotation, and whether the value may be None."""
    if not isinstance(hint, types.UnionType):
        return hint, False
    (kind,) = (choice for choice in typing.get_args(hint) if choice is not type(None))
    return kind, True
