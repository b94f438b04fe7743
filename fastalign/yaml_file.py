"""Read YAML in which a value has one meaning, and a key stands once."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*)?\.?[0-9_]*([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.I)
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


class NumberText(str):
    """A number as it is written, whose `repr` has no quotes."""

    def __repr__(self) -> str:
        """Return the number as it is written."""
        return str(self)


class _Loader(yaml.SafeLoader):
    """SafeLoader without timestamps, tags of other types, repeated keys or numbers in other bases.

    YAML 1.1, which PyYAML reads, takes 010 for 8 and 1:30 for 90; YAML 1.2 does not.
    """

    yaml_constructors: ClassVar[dict[Any, Any]] = {
        f"tag:yaml.org,2002:{tag}": yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{tag}"]
        for tag in _TAGS
    } | {None: yaml.SafeLoader.yaml_constructors[None]}
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] != "timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    numbers_as_text = False

    def number(self, node: yaml.ScalarNode) -> Any:
        """Return a decimal number, or its text for a reader that knows the field's type."""
        text = str(self.construct_scalar(node))
        is_int = node.tag.endswith(":int")
        if not (_DECIMAL if is_int else _FLOAT).fullmatch(text):
            raise self._refused(node, f"expected a decimal number, or text in quotes, got {text}")
        if self.numbers_as_text:
            if text.lower().endswith((".inf", ".nan")):
                raise self._refused(
                    node, f"expected a finite number, or text in quotes, got {text}"
                )
            return NumberText(text)
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping; raise if a key stands twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise self._refused(key, f"expected each key once, got {key.value!r} twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    @staticmethod
    def _refused(node: yaml.Node, problem: str) -> yaml.YAMLError:
        return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.number)


class _TextLoader(_Loader):
    numbers_as_text = True


def read_yaml_file(path: str | Path, *, numbers_as_text: bool = False) -> Any:
    """Return the content of a YAML file.

    Args:
        path: file in UTF-8.
        numbers_as_text: return numbers as they are written, so that a name such as 1.10 stays one.

    Raises:
        ValueError: if the file is not UTF-8 or not YAML, a key stands twice in a mapping, or a
            number is not decimal.
    """
    try:
        loader = (_TextLoader if numbers_as_text else _Loader)(Path(path).read_text("utf-8"))
        loader.name = str(path)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, KeyError) as error:  # the last two: `!!bool x`, `!!map x`
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{path}: not YAML: nested too deeply") from None


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"optim.lr": 1e-6}` from nested settings of any depth."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= flat_settings(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
