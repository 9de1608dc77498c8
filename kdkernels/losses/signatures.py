"""Keywords of the public functions: the signature that `inspect` and `help` show, and the error for an unknown one."""

import difflib
import inspect
from collections.abc import Callable, Container, Iterable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


def shows_keywords(of: Callable | None = None) -> Callable[[Function], Function]:
    """Sets the signature that a function with a ** parameter shows. The keywords of the function `of`, to which the
    function passes them on, replace the ** parameter. None: no keywords do, and the ** parameter is for
    `check_keywords`. The function itself stays the same, so a call has no further frame.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        parameters = [x for x in signature.parameters.values() if x.kind != x.VAR_KEYWORD]
        if of is not None:
            parameters += [x for x in inspect.signature(of).parameters.values() if x.kind == x.KEYWORD_ONLY]
        function.__signature__ = signature.replace(parameters=parameters)
        return function

    return decorate


def check_keywords(function: Callable, given: Iterable[str], known: Container[str] = ()) -> None:
    """Raises TypeError for a given keyword that is not known."""
    for name in given:
        if name not in known:
            raise unknown_keyword(function.__name__, name, inspect.signature(function).parameters)


def unknown_keyword(function: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for an unknown keyword of a function, with the nearest known one. (A compiler cannot trace difflib.)"""
    near = () if torch.compiler.is_compiling() else difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    suggestion = f", did you mean {near[0]!r}?" if near else ""
    return TypeError(f"{function}: unknown argument {name!r}{suggestion}; known: {', '.join(known)}")
