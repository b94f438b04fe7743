"""Measures of a checkout's structure: `python -m tests.repo` prints them and tests hold them.

Everything here reads source text alone, so any checkout can be measured, whatever its layout.
"""

import ast
import functools
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_MODULES = 15
MAX_PARAMETERS = 8
MAX_FUNCTION_LINES = 50
MAX_MODULE_LINES = 600
MIN_LINES_OF_A_HELPER = 60
COMMANDS = {"sft", "dpo", "kto", "online-dpo", "online_dpo", "reward", "ppo"}
BACKENDS = {"native", "reference", "torch_strips", "triton_kernels"}
POOR_OPENING = re.compile(r"(What|Of|Whether|How|Nothing|By|That)\b")
# Their keywords are promised: they stand where other libraries' functions stand.
DROP_INS = {
    "fused_linear_dpo_loss",
    "fused_linear_kto_loss",
    "fused_linear_loss",
    "fused_linear_ppo_loss",
    "fused_linear_preference_loss",
    "fused_linear_sft_loss",
    "kl_penalty",
    "kto_loss_fn",
    "linear_kl",
    "linear_logprob",
    "linear_logsumexp",
    "ppo_loss_fn",
    "sequence_logprob",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A source file.

    Attributes:
        path: path inside the checkout, e.g. `fastalign/ops/gae/op.py`.
        name: dotted name, e.g. `fastalign.ops.gae.op`; a package's is that of its folder.
        text: source.
    """

    path: str
    name: str
    text: str

    @property
    def is_package(self) -> bool:
        """True for an `__init__.py`."""
        return self.path.endswith("/__init__.py")

    @property
    def folder(self) -> str:
        """Path of the folder that it lies in."""
        return self.path.rpartition("/")[0]

    @property
    def stem(self) -> str:
        """File name without its ending."""
        return Path(self.path).stem

    @property
    def num_lines(self) -> int:
        """Number of lines."""
        return len(self.text.splitlines())

    @functools.cached_property
    def tree(self) -> ast.Module:
        """Parsed source."""
        return ast.parse(self.text)

    def functions(self) -> Iterator[Function]:
        """Yield every function and method, nested ones included."""
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                yield node


class Checkout:
    """The Python sources of a checkout."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.modules = {m.name: m for m in self.read("fastalign")}

    def read(self, folder: str) -> list[Module]:
        """Return the modules below a folder, sorted by path."""
        found = []
        for path in sorted((self.root / folder).rglob("*.py")):
            relative = path.relative_to(self.root).as_posix()
            name = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            found.append(Module(relative, name, path.read_text(encoding="utf-8")))
        return found

    @functools.cached_property
    def sources(self) -> list[Module]:
        """Modules of `fastalign` and of `benchmarks`."""
        return [*self.modules.values(), *self.read("benchmarks")]

    @functools.cached_property
    def imports(self) -> dict[str, set[str]]:
        """Modules of `fastalign` that each one imports: those that define the names it takes."""
        return {name: set(self._imported(module)) for name, module in self.modules.items()}

    @functools.cached_property
    def importers(self) -> dict[str, set[str]]:
        """Modules that import each one; a package that only passes names on is not among them."""
        found: dict[str, set[str]] = defaultdict(set)
        for importer, imported in self.imports.items():
            for name in imported:
                found[name].add(importer)
        return found

    def _imported(self, module: Module) -> Iterator[str]:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name in self.modules)
            elif isinstance(node, ast.ImportFrom) and node.module in self.modules:
                for alias in node.names:
                    if defining := self._defining(node.module, alias.name):
                        yield defining

    def _defining(self, module: str, name: str) -> str | None:
        """Return the module that defines `name`, which `module` may only pass on."""
        if f"{module}.{name}" in self.modules:
            return f"{module}.{name}"
        if module not in self.modules or not self.modules[module].is_package:
            return module if module in self.modules else None
        for node in ast.walk(self.modules[module].tree):
            if isinstance(node, ast.ImportFrom) and node.module in self.modules:
                for alias in node.names:
                    if (alias.asname or alias.name) == name and node.module != module:
                        return self._defining(node.module, alias.name)
        return module

    def closure(self, function: str) -> set[str]:
        """Return the modules that a function's own module reaches by imports, itself among them."""
        (start,) = (
            name
            for name, module in self.modules.items()
            if any(node.name == function for node in module.tree.body if isinstance(node, Function))
        )
        seen, todo = {start}, [start]
        while todo:
            new = self.imports[todo.pop()] - seen
            seen |= new
            todo += new
        return seen


def large_folders(checkout: Checkout) -> dict[str, int]:
    """Return the folders with more modules than allowed, `__init__` not counted."""
    sizes = Counter(module.folder for module in checkout.modules.values() if not module.is_package)
    return {folder: n for folder, n in sorted(sizes.items()) if n > MAX_MODULES}


def num_parameters(node: Function) -> int:
    """Return the number of a function's parameters, all kinds, without self and cls."""
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def is_promised(module: Module, node: Function) -> bool:
    """Return True if a function's signature is not its own: kernels, operations, drop-ins."""
    decorators = " ".join(ast.unparse(d) for d in node.decorator_list)
    registered = re.search(r"triton\.jit|custom_op|register_|triton_op|overload", decorators)
    return bool(registered) or module.stem in BACKENDS or node.name in DROP_INS


def many_parameters(checkout: Checkout) -> dict[str, int]:
    """Return the functions with more parameters than allowed, by name."""
    return {
        node.name: num_parameters(node)
        for module in checkout.sources
        for node in module.functions()
        if num_parameters(node) > MAX_PARAMETERS and not is_promised(module, node)
    }


def code_lines(node: Function) -> int:
    """Return the lines of a function's body without its docstring."""
    first, end = node.body[0], node.end_lineno or node.lineno
    lines = end - first.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def long_functions(checkout: Checkout) -> dict[str, int]:
    """Return the functions with more lines of code than allowed."""
    return {
        f"{module.path}::{node.name}": code_lines(node)
        for module in checkout.sources
        for node in module.functions()
        if code_lines(node) > MAX_FUNCTION_LINES
    }


def long_modules(checkout: Checkout) -> dict[str, int]:
    """Return the modules with more lines than allowed."""
    return {m.path: m.num_lines for m in checkout.sources if m.num_lines > MAX_MODULE_LINES}


def small_modules(checkout: Checkout) -> dict[str, int]:
    """Return the short modules that one module of their folder, and no other, imports.

    Backends stand apart, and so do modules whose names a package passes on to its users.
    """
    found = {}
    for name, module in checkout.modules.items():
        importers = checkout.importers[name]
        if (
            len(importers) == 1
            and module.num_lines < MIN_LINES_OF_A_HELPER
            and not module.is_package
            and module.stem not in BACKENDS
        ):
            (importer,) = (checkout.modules[importer] for importer in importers)
            if importer.folder == module.folder and not importer.is_package:
                found[module.path] = module.num_lines
    return found


def algorithm_tables(checkout: Checkout) -> dict[str, int]:
    """Return the literals that list three commands or more, outside the table of algorithms."""
    found: Counter[str] = Counter()
    for module in checkout.sources:
        if module.name == "fastalign.cli.algorithms":
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Dict):
                items = node.keys
            elif isinstance(node, ast.List | ast.Tuple | ast.Set):
                items = list(node.elts)
            else:
                continue
            words = {item.value for item in items if isinstance(item, ast.Constant)}
            found[module.path] += len(words & COMMANDS) >= 3
    return {path: n for path, n in found.items() if n}


def documented(module: Module) -> Iterator[tuple[str, str]]:
    """Yield the name and the docstring of a module and of all that it defines."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "name", module.name), text


def poor_openings(checkout: Checkout) -> dict[str, int]:
    """Return the docstrings of each module that open with What, Of, Whether, How, Nothing, By."""
    found = Counter(
        module.path
        for module in checkout.sources
        for _, text in documented(module)
        if POOR_OPENING.match(text)
    )
    return dict(found)


def not_imperative(checkout: Checkout) -> dict[str, int]:
    """Return the number of ruff's D401 in each file."""
    ruff = Path(sys.executable).parent / "ruff"
    options = ["--no-cache", "--isolated", "--select=D401", "--output-format=concise"]
    options += ["--config", 'lint.pydocstyle.convention="google"']
    done = subprocess.run(
        [str(ruff), "check", *options, "fastalign", "benchmarks"],
        cwd=checkout.root,
        capture_output=True,
        text=True,
        check=False,
    )
    return dict(Counter(line.partition(":")[0] for line in done.stdout.splitlines() if ":" in line))


def naming(checkout: Checkout, name: str) -> dict[str, int]:
    """Return the files in which a parameter or variable has this name, and how often."""
    found: Counter[str] = Counter()
    for module in checkout.modules.values():
        for node in ast.walk(module.tree):
            found[module.path] += (isinstance(node, ast.arg) and node.arg == name) or (
                isinstance(node, ast.Name) and node.id == name
            )
    return {path: n for path, n in found.items() if n}
