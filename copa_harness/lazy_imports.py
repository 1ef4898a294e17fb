"""Public names of a package that are loaded on first use (PEP 562).

    __getattr__, __dir__, __all__ = attach(__name__, {"intervals": ["mean_interval", "wilson_interval"]})

So importing a room, and with it the pytest plugin, loads neither torch nor DSPy. `lazy_loader.attach` does the same;
it would be the one third-party import of the plugin.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


def attach(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: Its `__name__`.
        homes: Public names by the module of the package that defines them (`"budget.scope"` for one further down).
    """
    home_of = {name: module for module, names in homes.items() for name in names}
    names = sorted(home_of)

    def load(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(names)}")
        value = getattr(import_module(f"{package}.{home_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    if same := {name for name, module in home_of.items() if name == module}:
        # Importing a module sets it in its package, where it would hide the function of the same name.
        class Package(ModuleType):
            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, getattr(value, name, value) if name in same else value)

        sys.modules[package].__class__ = Package
    return load, lambda: sorted({*vars(sys.modules[package]), *names}), names
