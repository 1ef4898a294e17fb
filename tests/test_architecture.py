"""The floors hold: every import points downwards, heavy libraries stay in their rooms, nothing happens at import.

Imports count wherever they stand, inside functions and under TYPE_CHECKING too.
"""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "copa_harness"

FLOORS = {
    "errors": 0,
    "lazy_imports": 0,
    "option_fields": 0,
    "results": 0,
    "atomic_files": 0,
    "shared_files": 0,
    "credentials": 0,
    "documents": 0,
    "strategy": 0,
    "formatting": 0,
    "tracing": 0,
    "judge": 1,
    "lm": 2,
    "tasks": 2,
    "store": 2,
    "report": 2,
    "robustness": 2,
    "evaluate": 3,
    "tune": 3,
    "testing": 3,
    "shared": 3,
    "optimize": 4,
    "export": 4,
    "lm.embedded.pretrain": 4,
    "session": 5,
    "plugin": 6,
    "fixtures": 6,
    "pytest_options": 6,
    "cli": 6,
    "starter": 6,
}
"""Room -> floor; the longest name that fits counts. A module imports from lower floors and from its own room."""

SINGLE = {0, 6}
"""Floors of single modules, which may use one another."""

HEAVY = {
    "torch": ("lm/local", "lm/embedded/pretrain", "testing/", "tune/"),
    "transformers": ("lm/local", "lm/embedded/pretrain", "testing/", "tune/"),
    "peft": ("lm/local", "lm/embedded/pretrain", "tune/"),
    "gguf": ("lm/local/sources", "testing/"),
    "dspy": ("lm/", "evaluate/", "testing/", "tune/", "optimize/", "tasks/", "robustness/", "export/"),
    "optuna": ("optimize/search/", "optimize/dspy_optimizers/"),
    "hypothesis": ("robustness/",),
    "mlflow": ("report/mlflow_tracking",),
    "tabulate": ("report/rendering",),
    "jinja2": ("report/page", "lm/local", "export/writing"),
    "pytest": ("plugin", "fixtures", "pytest_options", "testing/engine_contract"),
    "_pytest": (),
    "sklearn": ("tasks/", "optimize/", "lm/embedded/pretrain"),
    "diskcache": ("lm/cache/",),
    "sqlalchemy": ("shared/",),
    "fsspec": ("shared_files",),
    "ray": ("lm/local/ray_workers",),
    "psycopg": ("shared/",),
}
"""Library -> where it may be imported, as prefixes of the module's path in the package."""

MOST_MODULES = 15
"""In one folder, `__init__` not counted: what a reader takes in at a glance."""

MOST_PARAMETERS = 8
"""Of a function, `self` not counted: more of them are a thing without a name."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return path.relative_to(PACKAGE).as_posix().removesuffix(".py")


def dotted(path):
    """`lm.cache.store`; a package by its own name."""
    return name_of(path).removesuffix("__init__").rstrip("/").replace("/", ".")


def room_of(module):
    """The longest room that a dotted name lies in, or None."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOORS), None)


def imported_modules(path):
    """Every (absolute dotted name, line) the module imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield module, node.lineno
            if module == "copa_harness":
                yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def type_checking_lines(path):
    """Lines inside `if TYPE_CHECKING:` blocks."""
    lines = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            lines.update(range(node.lineno, (node.body[-1].end_lineno or node.lineno) + 1))
    return lines


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_to_lower_floors_or_the_own_room(path):
    if not dotted(path):
        pytest.skip("the package's own names are re-exported lazily from every floor")
    room = room_of(dotted(path))
    assert room, f"{name_of(path)} stands on no floor; give its room one in FLOORS"
    for module, line in imported_modules(path):
        if not module.startswith("copa_harness."):
            continue
        target = room_of(module.removeprefix("copa_harness."))
        if target == room:
            continue
        assert target, f"{name_of(path)}:{line} imports {module}, which stands on no floor"
        same_floor = FLOORS[target] == FLOORS[room] and FLOORS[room] in SINGLE
        assert FLOORS[target] < FLOORS[room] or same_floor, (
            f"{name_of(path)}:{line} (floor {FLOORS[room]}) imports {module} (floor {FLOORS[target]})"
        )


def test_the_guide_draws_every_room_on_its_floor():
    picture = (PACKAGE / "README.md").read_text(encoding="utf-8").split("```")[1]
    drawn, floor = {}, None
    for line in picture.splitlines():
        floor = int(line[0]) if line[:1].isdigit() else floor
        drawn |= dict.fromkeys(re.findall(r"([\w/]+)(?:/|\.py)(?=\s)", line), floor)
    assert drawn == {room.replace(".", "/"): floor for room, floor in FLOORS.items()}


def import_graph():
    """Module -> modules of this package it imports, wherever the import stands."""
    modules = {f"copa_harness.{dotted(path)}".rstrip("."): path for path in MODULES}
    graph = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {one if one in modules else node.module for one in submodules}
        graph[name] = found & set(modules)
    return graph


def cycles_of(graph):
    """Sets of nodes that reach one another."""
    reached = {}
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += graph[node]
        reached[start] = seen
    return {frozenset(n for n in reached[m] if m in reached[n]) for m in graph if m in reached[m]}


def test_no_two_modules_import_each_other_by_whatever_way():
    assert [sorted(cycle) for cycle in cycles_of(import_graph())] == []


def test_a_cycle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert cycles_of(graph) == {frozenset("abc")}


def test_a_folder_holds_no_more_modules_than_can_be_taken_in_at_a_glance():
    counts = {folder: len([*folder.glob("*.py")]) - 1 for folder in {path.parent for path in MODULES}}
    assert {str(folder): n for folder, n in counts.items() if n > MOST_MODULES} == {}


def functions_of(node, prefix):
    """Every (dotted name, function), methods and inner functions too."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        name = f"{prefix}.{child.name}" if named else prefix
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, child
        yield from functions_of(child, name)


def n_parameters(function):
    names = [one.arg for one in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return sum(name not in ("self", "cls") for name in names)


def test_no_function_takes_more_arguments_than_one_keeps_apart():
    found = [one for path in MODULES for one in functions_of(ast.parse(path.read_text()), dotted(path))]
    longer = {name: n_parameters(function) for name, function in found if n_parameters(function) > MOST_PARAMETERS}
    assert longer == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_stay_in_their_rooms(path):
    annotations_only = type_checking_lines(path)
    for module, line in imported_modules(path):
        homes = HEAVY.get(module.split(".")[0])
        if homes is not None and line not in annotations_only:
            assert name_of(path).startswith(homes or ("-",)), f"{name_of(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_dspy_does_not_promise_is_imported_in_one_place(path):
    public = ("dspy.clients.provider", "dspy.clients.utils_finetune")
    for module, line in imported_modules(path):
        is_private = module.startswith("dspy.clients.") or any(part.startswith("_") for part in module.split("."))
        if module.startswith("dspy.") and is_private and module not in public:
            assert name_of(path) == "lm/dspy_internals", f"{name_of(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_say_what_they_do(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name_of(path)} opens without a word on what it does"


def test_there_is_no_drawer_for_odds_and_ends():
    assert [name_of(path) for path in MODULES if path.stem in ("utils", "util", "helpers", "common", "misc")] == []


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for path in MODULES}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def run_python(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


PACKAGES = [path for path in MODULES if path.name == "__init__.py" and "attach(" in path.read_text()]


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_every_name_a_package_offers_can_be_loaded(path):
    package = importlib.import_module(f"copa_harness.{dotted(path)}".rstrip("."))
    assert [name for name in package.__all__ if getattr(package, name) is None] == []
    with pytest.raises(AttributeError, match="it has"):
        package.no_such_name


@pytest.mark.parametrize(
    "module",
    [
        "copa_harness",
        "copa_harness.plugin",
        "copa_harness.tasks",
        "copa_harness.session",
        "copa_harness.session.options",
        "copa_harness.session.runs",
        "copa_harness.lm",
        "copa_harness.tune",
        "copa_harness.evaluate",
        "copa_harness.optimize",
        "copa_harness.report",
        "copa_harness.store",
        "copa_harness.judge",
    ],
)
def test_importing_the_package_loads_nothing_heavy(module):
    heavy = ["torch", "dspy", "transformers", "peft", "optuna", "sklearn", "scipy", "diskcache", "tabulate"]
    loaded = run_python(f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_the_plugin_imports_pytest_and_the_standard_library_only():
    code = (
        "import sys, pytest; before = set(sys.modules); import copa_harness.plugin; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    assert run_python(code).strip() == "['copa_harness']"


def test_a_plain_pytest_run_imports_and_writes_nothing(tmp_path):
    (tmp_path / "test_plain.py").write_text(
        "import sys\n"
        "def test_plain():\n"
        "    assert 'copa_harness.plugin' in sys.modules\n"
        "    heavy = {'torch', 'dspy', 'numpy', 'copa_harness.session.session', 'copa_harness.optimize.copa'}\n"
        "    loaded = heavy & set(sys.modules)\n"
        "    assert not loaded\n"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "--strict-markers", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["test_plain.py"]
    assert "copa" not in result.stdout
