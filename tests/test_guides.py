"""The guides are true where a machine can tell: what they link to, name and import exists, and no option is missing."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from copa_harness.optimize.copa import COPA
from copa_harness.optimize.options import SearchOptions
from copa_harness.option_fields import Place, markdown_table, options_in, options_of, with_tables
from copa_harness.session.options import OPTION_KINDS, Settings, marker_options

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
    known = {one.flag for one in options_in(Settings, Place.COMMAND_LINE).values()}
    assert set(re.findall(r"--copa-[a-z-]*[a-z]", guide.read_text(encoding="utf-8"))) <= known


@pytest.mark.parametrize("kind", OPTION_KINDS)
def test_every_option_stands_in_a_table_of_a_guide_as_the_dataclasses_say(kind):
    with_it = [guide for guide in GUIDES if f"<!-- options: {kind} -->" in guide.read_text(encoding="utf-8")]
    assert len(with_it) == 1
    text = with_it[0].read_text(encoding="utf-8")
    assert markdown_table(OPTION_KINDS[kind]) in text, "run `make tables`"
    assert with_tables(text, OPTION_KINDS) == text, "run `make tables`"


def test_every_argument_of_the_marker_and_of_copa_stands_in_a_guide():
    names = {*marker_options(), *options_of(SearchOptions), *inspect.signature(COPA).parameters} - {"search"}
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
