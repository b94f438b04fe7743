"""No line of the package reads what could be code: a new one is a decision, made here."""

import ast
from collections.abc import Iterator

import pytest

from tests.repo.structure import Checkout

READERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
ALLOWED_NAMES = {"UnpicklingError"}  # an error to catch


def faults(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in READERS:
                    yield f"line {node.lineno}: import {alias.name}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in READERS:
            for alias in node.names:
                if alias.name not in ALLOWED_NAMES:
                    yield f"line {node.lineno}: from {node.module} import {alias.name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("eval", "exec", "yaml.load", "yaml.unsafe_load"):
            yield f"line {node.lineno}: {called}()"
        if called == "torch.load" and given.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load() without weights_only=True"
        for name in ("trust_remote_code", "allow_pickle"):
            if given.get(name) == "True":
                yield f"line {node.lineno}: {name}=True"


def test_no_file_reads_what_could_be_code() -> None:
    modules = Checkout().modules.values()
    assert len(modules) > 100
    assert [f"{m.path}: {fault}" for m in modules for fault in faults(m.text)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_the_test_finds_what_it_looks_for(line: str) -> None:
    assert len(list(faults(line))) == 1
    assert list(faults("from pickle import UnpicklingError")) == []
    assert list(faults("torch.load(path, weights_only=True)")) == []
