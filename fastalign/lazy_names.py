"""Packages that import their public names on first use, so that `import fastalign` loads no torch.

`fastalign --help` answers at once, and the command line can set what torch's libraries read when
they are loaded (`fastalign.process`).
"""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any


def imported_on_use(package: str) -> Callable[[str], Any]:
    """Return the `__getattr__` (PEP 562) of a package whose imports are for type checkers alone.

    They stand below `if TYPE_CHECKING:`, and each is made when its name is first asked for.
    """

    @cache
    def homes() -> dict[str, str]:
        tree = ast.parse(inspect.getsource(sys.modules[package]))
        imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        return {alias.name: node.module or "" for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name.startswith("__") or name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes()[name] == package:  # a module of the package
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(homes()[name]), name)
        setattr(sys.modules[package], name, value)  # found without this function from now on
        return value

    return get
