"""Imports point one way, and what travels as remote code is small: read from the syntax tree, nothing is executed.

Two literal tables give the order. A new module takes its place in one of them, or the test names it.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

ROOT = Path(__file__).resolve().parents[1]

# Tracked folders at the top of the repository, and no others.
TOP_LEVEL = {
    ".ci",
    ".github",
    "benchmarks",
    "conversion",
    "docs",
    "examples",
    "findings",
    "model_cards",
    "modeling",
    "src",
    "tests",
}
NOT_TRACKED = {"build", "dist", "flexmoe.egg-info", "runs", "site"}

# What travels beside each checkpoint is at most this large, so that it can be read before it is trusted.
MOST_FILES = 12
MOST_LINES = 3520  # 3,200 before the evidence of the tokens so far, which a model needs wherever it runs

# modeling/ bottom-up: a module imports only modules before it.
MODELING_ORDER = (
    "configuration",
    "anchors",
    "routing",
    "distributed",
    "evidence",
    "masking",
    "low_rank",
    "experts",
    "fingerprint",
    "adapters",
    "lifecycle",
    "modeling",
)

# The package bottom-up: a part imports only parts before it. "flexmoe.modeling" stands for all of its modules.
PARTS = (
    "flexmoe.modeling",
    "flexmoe.registration",
    "flexmoe.structures",
    "flexmoe.meta",
    "flexmoe.norms",
    "flexmoe.cpu",
    "flexmoe.kernels",
    "flexmoe.implementations",
    "flexmoe.usage",
    "flexmoe.parallel",
    "flexmoe.adapters",
    "flexmoe.batching",
    "flexmoe.classification",
    "flexmoe.data",
    "flexmoe.metrics",
    "flexmoe.io",
    "flexmoe.model_cards",
    "flexmoe.cards",
    "flexmoe.packages",
    "flexmoe.foreign_code",
    "flexmoe.tokenization",
    "flexmoe.companions",
    "flexmoe.hub",
    "flexmoe.evaluation",
    "flexmoe.admission",
    "flexmoe.composition",
    "flexmoe.conversion",
    "flexmoe.card_files",
    "flexmoe.routers",
    "flexmoe.recipes",
    "flexmoe.grafting",
    "flexmoe.training",
    "flexmoe.planning",
    "flexmoe.inspection",
    "flexmoe.peft",
    "flexmoe.testing",
    "flexmoe.demo",
    "flexmoe_cli",
    "flexmoe.cli",
    "flexmoe.__main__",
    "flexmoe",
)

# Programs: nothing imports from them, so their modules are documented, but not each name.
PROGRAMS = ("flexmoe.demo.",)

MODELING_PACKAGES = {"torch", "transformers", "safetensors", "huggingface_hub"}
NETWORK = {"huggingface_hub", "requests", "urllib", "http", "httpx", "aiohttp", "socket", "ftplib"}
# These check fields of a configuration or of a card, and open no connection.
NOT_NETWORK = {"huggingface_hub.dataclasses", "huggingface_hub.repocard_data"}
# The only module that opens connections.
CLIENT = ROOT / "src" / "flexmoe" / "hub" / "client.py"


@dataclass(frozen=True)
class Import:
    """One imported module, absolute ("flexmoe.data") or relative (".tensors_flexmoe"), and where it stands."""

    module: str
    names: tuple[str, ...]
    line: int
    in_function: bool
    in_try: bool
    for_types: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


@dataclass(frozen=True)
class Source:
    """A module of the package: its dotted name once installed, its file, its syntax tree."""

    name: str
    path: Path
    tree: ast.Module

    def imports(self) -> list[Import]:
        return list(_imports(self.tree, in_function=False, in_try=False, for_types=False))


def _imports(node: ast.AST, *, in_function: bool, in_try: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        where = {
            "in_function": in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef),
            "in_try": in_try or isinstance(child, ast.Try),
            "for_types": for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)),
        }
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, (), child.lineno, **where)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            yield Import(module, tuple(alias.name for alias in child.names), child.lineno, **where)
        yield from _imports(child, **where)


def _sources() -> list[Source]:
    folders = {
        "flexmoe.modeling": ROOT / "modeling",
        "flexmoe.conversion": ROOT / "conversion",
        "flexmoe.model_cards": ROOT / "model_cards",
        "flexmoe": ROOT / "src" / "flexmoe",
        "flexmoe_cli": ROOT / "src" / "flexmoe_cli",
    }
    found = []
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found.append(Source(name, path, ast.parse(path.read_text(encoding="utf-8"))))
    return found


SOURCES = _sources()
MODELING = [
    source for source in SOURCES if source.path.parent == ROOT / "modeling" and source.path.name != "__init__.py"
]
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
each_modeling = pytest.mark.parametrize("source", MODELING, ids=lambda source: source.path.stem)


def _part(name: str) -> str | None:
    """The part that a dotted name belongs to: the longest that it equals or lies under."""
    fits = [part for part in PARTS if name == part or (part != "flexmoe" and name.startswith(part + "."))]
    return max(fits, key=len, default=None)


def _place(stem: str) -> int | None:
    """The position of a file of modeling/ in `MODELING_ORDER`."""
    name = stem.removesuffix("_flexmoe")
    return MODELING_ORDER.index(name) if name in MODELING_ORDER else None


def test_top_level_folders_are_those_of_the_design() -> None:
    folders = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and (path.name in (".ci", ".github") or path.name[0] not in "._")
    }
    assert folders - NOT_TRACKED <= TOP_LEVEL, "the top level is fixed: put new code into one of its folders"


@each_source
def test_imports_of_the_library_point_one_way(source: Source) -> None:
    part = _part(source.name)
    assert part, f"{source.name} has no place in PARTS: give it one"
    for item in source.imports():
        if item.module.startswith(".") or item.top not in ("flexmoe", "flexmoe_cli") or item.for_types:
            continue
        # `from flexmoe import data` names the module in what is imported
        targets = [f"flexmoe.{name}" for name in item.names] if item.module == "flexmoe" else [item.module]
        for target in targets:
            target_part = _part(target) or "flexmoe"
            assert PARTS.index(target_part) <= PARTS.index(part), (
                f"{source.path}:{item.line}: {source.name} must not import {target}"
            )


def test_remote_code_is_small() -> None:
    files = sorted(path for path in (ROOT / "modeling").glob("*.py") if path.name != "__init__.py")
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert len(files) <= MOST_FILES
    assert lines <= MOST_LINES
    assert [path.name for path in (ROOT / "modeling").iterdir() if path.is_dir()] in ([], ["__pycache__"])


@each_modeling
def test_modeling_imports_only_what_travels_with_it(source: Source) -> None:
    for item in source.imports():
        where = f"{source.path}:{item.line}: {item.module or item.names}"
        if item.module.startswith("."):
            # transformers copies a remote-code model's files by following exactly this form
            assert item.module.count(".") == 1, f"{where}: write `from .sibling import name`"
            assert len(item.module) > 1, f"{where}: write `from .sibling import name`"
        else:
            assert item.top in MODELING_PACKAGES | set(sys.stdlib_module_names), f"{where}: not for modeling/"


@each_modeling
def test_modeling_imports_siblings_that_come_before(source: Source) -> None:
    place = _place(source.path.stem)
    assert place is not None, f"{source.path.name} has no place in MODELING_ORDER: give it one"
    for item in source.imports():
        if item.module.startswith(".") and not item.for_types:
            sibling = _place(item.module[1:])
            assert sibling is not None, f"{source.path}:{item.line}: {item.module} has no place in MODELING_ORDER"
            assert sibling < place, f"{source.path}:{item.line}: {item.module} comes after {source.path.stem}"


def test_transformers_finds_every_file_that_the_model_needs() -> None:
    """The files that travel are those that transformers' own walker finds, which matches lines of text."""
    start = ROOT / "modeling" / "modeling_flexmoe.py"
    walked = {Path(path).name for path in get_relative_import_files(start)} | {start.name}
    imports = {
        source.path.name: {f"{i.module[1:]}.py" for i in source.imports() if i.module[0] == "."} for source in MODELING
    }
    needed, new = set(), {start.name}
    while new:
        needed |= new
        new = {name for file in new for name in imports[file]} - needed
    assert walked == needed
    for name in walked:
        outside = set(get_imports(ROOT / "modeling" / name)) - set(sys.stdlib_module_names)
        assert outside <= MODELING_PACKAGES, f"{name}: transformers would ask readers to install {outside}"


@each_source
def test_only_one_module_opens_connections(source: Source) -> None:
    if source.path == CLIENT:
        return
    for item in source.imports():
        assert item.top not in NETWORK or item.module in NOT_NETWORK or item.for_types, (
            f"{source.path}:{item.line}: {item.module} is for {CLIENT.relative_to(ROOT)}"
        )


@pytest.mark.parametrize("name", ["flexmoe_cli"])
def test_the_command_line_imports_the_library_only_in_its_commands(name: str) -> None:
    quick = {"rich", "typer", name, *sys.stdlib_module_names}
    for source in SOURCES:
        if source.name.split(".")[0] == name:
            for item in source.imports():
                assert item.in_function or item.for_types or item.top in quick, (
                    f"{source.path}:{item.line}: {item.module} would slow down --help"
                )


@each_source
def test_public_names_are_documented(source: Source) -> None:
    if source.path.name == "__init__.py" and not source.path.read_text(encoding="utf-8").strip():
        return
    assert ast.get_docstring(source.tree), f"{source.path} has no docstring"
    if source.name.startswith(PROGRAMS):
        return
    missing = [name for name, node in _public(source.tree) if not ast.get_docstring(node)]
    assert not missing, f"{source.path}: no docstring on {', '.join(missing)}"


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions and classes of a module, and public methods of those classes that do not override a base's."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef) and not node.bases:
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        yield f"{node.name}.{method.name}", method


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import a.b", Import("a.b", (), 1, False, False, False)),
        ("from .x import y", Import(".x", ("y",), 1, False, False, False)),
        ("def f():\n    import a", Import("a", (), 2, True, False, False)),
        ("try:\n    import a\nexcept ImportError: pass", Import("a", (), 2, False, True, False)),
        ("if TYPE_CHECKING:\n    import a", Import("a", (), 2, False, False, True)),
    ],
)
def test_each_form_of_import_is_found(code: str, expected: Import) -> None:
    assert Source("x", Path("x.py"), ast.parse(code)).imports() == [expected]


def test_every_module_is_in_the_wheel() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = set(re.findall(r'"([\w.]+)"', re.search(r"^packages = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1]))
    found = {
        source.name if source.path.name == "__init__.py" else source.name.rpartition(".")[0] for source in SOURCES
    }
    assert found == declared
