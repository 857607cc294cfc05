"""Imports run one way, and nothing is ever unpickled or evaluated."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kvcache", "data", "pipeline", "cli")
MAY_IMPORT = {
    "kvcache": {"kvcache"},
    "data": {"data"},
    "pipeline": {"pipeline", "kvcache", "data"},
    "cli": {"cli", "pipeline", "kvcache", "data"},
}
SOURCES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "compile", "torch.load", "torch.save", "torch.package", "os.system"}

each_source = pytest.mark.parametrize("path", SOURCES, ids=str)


def imported_modules(path: Path, tree: ast.AST) -> list[str]:
    """Every imported module by its full name; those of kvpipe as `kvpipe.<folder>...`."""
    package = ("kvpipe", *path.parent.parts)
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            # `from .. import data` names a package only among its aliases.
            modules += [f"{module}.{alias.name}" for alias in node.names] if module == "kvpipe" else [module]
    return modules


def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def test_there_are_sources_in_every_package() -> None:
    assert {path.parts[0] for path in SOURCES} == set(PACKAGES)


@each_source
def test_imports_run_one_way(path: Path) -> None:
    imported = {name.split(".")[1] for name in imported_modules(path, parsed(path)) if name.startswith("kvpipe.")}
    assert imported <= MAY_IMPORT[path.parts[0]]


@each_source
def test_imports_within_kvpipe_are_relative(path: Path) -> None:
    absolute = [
        name
        for node in ast.walk(parsed(path))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""] * (not node.level)
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name.split(".")[0] in {"kvpipe", "tests", *PACKAGES}
    ]
    assert absolute == []


@each_source
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    tree = parsed(path)
    modules = {name.split(".")[0] for name in imported_modules(path, tree)}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    unsafe_options = {
        keyword.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
    }
    assert modules & UNSAFE_MODULES == set()
    assert calls & UNSAFE_CALLS == set()
    assert unsafe_options == set()


@pytest.mark.parametrize(
    ("path", "line", "module"),
    [
        ("data/sample.py", "from ..kvcache import store", "kvpipe.kvcache"),
        ("data/sample.py", "from .. import kvcache", "kvpipe.kvcache"),
        ("kvcache/align/aligner.py", "from ...data.sample import Sample", "kvpipe.data.sample"),
        ("kvcache/align/aligner.py", "from ..layout import KV", "kvpipe.kvcache.layout"),
        ("cli/app.py", "import kvpipe.data", "kvpipe.data"),
    ],
)
def test_the_rule_sees_every_way_to_import(path: str, line: str, module: str) -> None:
    assert imported_modules(Path(path), ast.parse(line)) == [module]
