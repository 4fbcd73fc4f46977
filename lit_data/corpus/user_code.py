"""Loads user-defined functions, named on the command line as `module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def load_function(spec: str, flag: str) -> Callable[..., Any]:
    """Import `module:function`; modules are searched on Python's path and in the current folder.

    Raises:
        ValueError: wrong form, no such module or function, not callable, or importing it fails.
    """
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ValueError(f"{flag} {spec}: name a function as module:function, such as my_package.my_module:my_function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        if missing:
            raise ValueError(
                f"{flag} {spec}: there is no module {module_name}; put its folder into PYTHONPATH"
            ) from error
        raise ValueError(f"{flag} {spec}: importing {module_name} failed: {describe(error)}") from error
    function = getattr(module, name, None)
    if function is None:
        raise ValueError(f"{flag} {spec}: {module_name} ({getattr(module, '__file__', None)}) has no function {name}")
    if not callable(function):
        raise ValueError(f"{flag} {spec}: {name} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def describe(error: BaseException) -> str:
    """An error's kind and message in one line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
