"""The floors hold: every import points downwards, heavy libraries stay in their rooms, nothing happens at import.

Imports count wherever they stand, inside functions and under TYPE_CHECKING too.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "copa_harness"

FLOORS = {
    "errors": 0, "results": 0, "documents": 0,
    "judge": 1,
    "lm": 2, "tasks": 2, "store": 2, "report": 2,
    "evaluate": 3, "tune": 3, "pretrain": 3,
    "optimize": 4,
    "session": 5,
    "plugin": 6, "fixtures": 6, "options": 6, "cli": 6,
}  # fmt: skip
"""Room -> floor. A module imports from lower floors and from its own room."""

DOORS = {"plugin", "fixtures", "options", "cli"}
"""The doors are single modules; they may use one another."""

HEAVY = {
    "torch": ("lm/local", "tune/", "pretrain/"),
    "transformers": ("lm/local", "tune/", "pretrain/"),
    "peft": ("lm/local", "tune/", "pretrain/"),
    "dspy": ("lm/", "evaluate/", "tune/", "optimize/", "tasks/", "pretrain/"),
    "optuna": ("optimize/",),
    "hypothesis": ("evaluate/robustness",),
    "tabulate": ("report/tables",),
    "pytest": ("plugin", "fixtures", "options"),
    "_pytest": (),
    "sklearn": ("tasks/", "optimize/", "pretrain/"),
    "diskcache": ("lm/cache",),
}
"""Library -> where it may be imported, as prefixes of the module's path in the package."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return path.relative_to(PACKAGE).as_posix().removesuffix(".py")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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
    room = room_of(path)
    if room == "__init__":
        pytest.skip("the package's own names are re-exported lazily from every floor")
    assert room in FLOORS, f"{name_of(path)} stands on no floor; give its room one in FLOORS"
    for module, line in imported_modules(path):
        if not module.startswith("copa_harness."):
            continue
        target = module.split(".")[1]
        if target == room:
            continue
        assert target in FLOORS, f"{name_of(path)}:{line} imports {module}, which stands on no floor"
        same_upper_floor = FLOORS[target] == FLOORS[room] and {room, target} <= DOORS
        assert FLOORS[target] < FLOORS[room] or same_upper_floor, (
            f"{name_of(path)}:{line} (floor {FLOORS[room]}) imports {module} (floor {FLOORS[target]})"
        )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_stay_in_their_rooms(path):
    annotations_only = type_checking_lines(path)
    for module, line in imported_modules(path):
        homes = HEAVY.get(module.split(".")[0])
        if homes is not None and line not in annotations_only:
            assert name_of(path).startswith(homes or ("-",)), f"{name_of(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_short_enough_to_be_read_and_say_what_they_do(path):
    text = path.read_text()
    assert text.count("\n") <= 300, f"{name_of(path)} has {text.count(chr(10))} lines; split it by what it knows"
    assert ast.get_docstring(ast.parse(text)), f"{name_of(path)} opens without a word on what it does"


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


@pytest.mark.parametrize(
    "module",
    ["copa_harness", "copa_harness.plugin", "copa_harness.tasks", "copa_harness.session",
     "copa_harness.session.settings", "copa_harness.session.runs",
     "copa_harness.lm", "copa_harness.tune", "copa_harness.evaluate", "copa_harness.optimize", "copa_harness.report",
     "copa_harness.store", "copa_harness.judge"],
)  # fmt: skip
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
        "    loaded = {'torch', 'dspy', 'copa_harness.session', 'copa_harness.results'} & set(sys.modules)\n"
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
