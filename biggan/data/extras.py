"""Packages that only some formats need."""

from __future__ import annotations

import importlib
from types import ModuleType

from runtime.errors import UserError


def optional_package(module: str, extra: str, what: str) -> ModuleType:
    """Imports a module of an extra.

    Args:
        what: what needs it, for the message.

    Raises:
        UserError: it is not installed, or does not start; says which command installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{what} needs the package {package} ({error}): pip install {package}, or pip install smyrf-hrr[{extra}]"
        ) from None
