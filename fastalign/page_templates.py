"""Pages from templates: texts of models, data and names are escaped, and safe to show."""

from collections.abc import Callable
from typing import Any

from fastalign.output import shown


def environment(package: str, folder: str = ".", show: Callable[[str], str] = shown) -> Any:
    """Return a Jinja environment of the templates in a package's folder.

    Every text passes through `show`; by default, control characters are visible, and secrets
    masked.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        is_text = isinstance(value, str) and not isinstance(value, Markup)
        return show(value) if is_text else value

    return Environment(
        loader=PackageLoader(package, folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=finalize,
    )
