"""The guides are true where a machine can tell: what they link to, name and import exists, and no option is missing."""

import ast
import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from copa_harness.optimize.copa import COPA
from copa_harness.options import GATE_NAMES, OPTIONS, SWITCHES
from copa_harness.session.settings import SEARCH, MarkerArguments
from copa_harness.tune.settings import LoraSettings

ROOT = Path(__file__).parent.parent
NOT_OURS = {".venv", ".git", ".copa_cache", ".pytest_cache", "build", "dist", "node_modules"}


def files_below(root, pattern):
    """Files of the repository, without what environments and runs leave in it."""
    found = (path for path in root.rglob(pattern) if path.is_file())
    return sorted(
        path
        for path in found
        if not NOT_OURS & set(path.relative_to(root).parts)
        and not (path.parent == root / "reports" and path.name != "README.md")
    )


GUIDES = files_below(ROOT, "*.md")
FILES = {path.relative_to(ROOT).as_posix() for path in files_below(ROOT, "*")}
RUNTIME_FOLDERS = {"artifacts/", "lora/", "responses/", "stages/", "studies/", "runs/", "safetensors/"}
"""In the cache directory."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prose(guide):
    """The text without its code blocks."""
    return FENCE.sub("", guide.read_text(encoding="utf-8"))


def blocks(guide, *languages):
    return [code for language, code in FENCE.findall(guide.read_text(encoding="utf-8")) if language in languages]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


every_guide = pytest.mark.parametrize("guide", GUIDES, ids=name_of)


def anchors(guide):
    """The names GitHub gives to headings."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(guide), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_guide
def test_every_link_leads_somewhere(guide):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(guide)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (guide.parent / path).resolve() if path else guide
        assert linked.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading"


@every_guide
def test_every_file_it_names_is_there(guide):
    """In backquotes, from the root, from the package, from the guide's folder, or by a name somewhere below it."""
    here = guide.parent.relative_to(ROOT).as_posix()
    for named in re.findall(r"`([\w./-]+\.py|[\w./-]+/)`", prose(guide)):
        if named.startswith((".", "-")) or named in RUNTIME_FOLDERS:
            continue
        candidates = [f"{place}/{named}".removeprefix("./") for place in (here, "copa_harness")] + [named]
        there = any(path == one or path.startswith(one.rstrip("/") + "/") for one in candidates for path in FILES)
        below = any(path.startswith(f"{here}/") and path.endswith(f"/{named}") for path in FILES)
        assert there or below, f"{named}: no such file or folder"


@every_guide
def test_its_python_compiles_and_imports_what_exists(guide):
    for code in blocks(guide, "python"):
        for node in ast.walk(ast.parse(code)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                if module.split(".")[0] == "copa_harness":
                    imported = importlib.import_module(module)
                    for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                        assert hasattr(imported, alias.name), f"{module} has no {alias.name}"


@every_guide
def test_every_option_it_names_exists(guide):
    known = {f"--copa-{name}" for name in (*OPTIONS, *SWITCHES, "disable", "bless", "plan")}
    assert set(re.findall(r"--copa-[a-z-]*[a-z]", guide.read_text(encoding="utf-8"))) <= known


def table_of(guide, options):
    """The table between `<!-- options: NAME -->` and `<!-- end options -->`: names in the first column."""
    text = (ROOT / guide).read_text(encoding="utf-8")
    found = re.search(rf"<!-- options: {options} -->\n(.*?)<!-- end options -->", text, re.DOTALL)
    assert found, f"{guide} has no table of {options}"
    first_cells = [line.split("|")[1] for line in found[1].splitlines() if line.startswith("| `")]
    return [name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_search_setting_stands_in_the_guide():
    assert sorted(table_of("copa_harness/optimize/README.md", "SearchOptions")) == sorted(SEARCH)


def test_every_gate_stands_in_the_guide():
    assert sorted(table_of("suites/README.md", "Gates")) == sorted(GATE_NAMES)


def test_every_option_of_the_plugin_stands_in_the_guide():
    known = [f"--copa-{name}" for name in (*OPTIONS, *SWITCHES, "disable", "bless", "plan")]
    assert sorted(table_of("suites/README.md", "SessionOptions")) == sorted(known)


def test_every_lora_setting_stands_in_the_guide():
    names = {entry.name for entry in fields(LoraSettings)} - {"processes"}
    assert sorted(table_of("copa_harness/tune/README.md", "LoraSettings")) == sorted(names)


def test_every_argument_of_the_marker_and_of_copa_stands_in_a_guide():
    names = {entry.name for entry in fields(MarkerArguments)} | set(inspect.signature(COPA).parameters)
    text = "\n".join(prose(guide) for guide in GUIDES)
    assert [name for name in sorted(names) if not re.search(rf"`[^`]*\b{name}\b[^`]*`", text)] == []


def test_every_target_that_a_guide_names_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for guide in GUIDES:
        code = "\n".join([*blocks(guide, "console"), *re.findall(r"`(make [^`]+)`", prose(guide))])
        assert set(re.findall(r"^(?:\$ )?make ([a-z]+)", code, re.MULTILINE)) <= targets, name_of(guide)


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):", makefile, re.MULTILINE)
    assert targets == re.findall(r"^([a-z]+):.*## \w", makefile, re.MULTILINE)


def test_the_readme_is_an_entrance_and_leads_to_every_guide():
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 150
    linked = set(re.findall(r"\]\(([^)#\s]+\.md)", readme.read_text(encoding="utf-8")))
    assert {name_of(guide) for guide in GUIDES} - {"README.md"} == linked


def test_pre_commit_uses_the_ruff_of_the_constraints():
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned
    assert f"rev: v{pinned[1]}\n" in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
