"""Every public module, class, function and method has a docstring."""

import ast
from collections.abc import Iterator

from tests.repo.structure import Checkout, Function, Module


def is_overload(node: ast.ClassDef | Function) -> bool:
    """An overload is documented where it is implemented."""
    return any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)


def undocumented(module: Module) -> Iterator[str]:
    if not ast.get_docstring(module.tree):
        yield module.path

    def visit(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | Function):
                if child.name.startswith("_") or is_overload(child):
                    continue
                if ast.get_docstring(child) is None:
                    yield prefix + child.name
                if isinstance(child, ast.ClassDef):
                    yield from visit(child, f"{prefix}{child.name}.")

    yield from visit(module.tree, f"{module.path}: ")


def test_everything_public_is_documented() -> None:
    sources = Checkout().sources
    assert len(sources) > 100
    assert [name for module in sources for name in undocumented(module)] == []
