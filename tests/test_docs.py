"""The documentation says what the code does: generated pages are current, every flag and every command exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from wan.cli import args as cli
from wan.engine.optimizations import registry
from wan.engine.plan import options

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")])


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current() -> None:
    stale = [path.name for path, text in load_tool("gen_docs").pages().items() if path.read_text("utf-8") != text]
    assert not stale, "run `make docs`"


def test_every_flag_appears_in_the_documentation() -> None:
    parser = cli.build_parser(options(registry()))
    documented = (ROOT / "docs" / "cli.md").read_text("utf-8")
    flags = {flag for action in parser._actions for flag in action.option_strings if flag not in ("-h", "--help")}
    assert not sorted(flag for flag in flags if f"`{flag}`" not in documented)


def test_every_preset_key_is_an_option_and_has_a_reason() -> None:
    import tomllib

    names = {o.name for o in options(registry())}
    for path in sorted((ROOT / "configs").glob("*.toml")):
        text = path.read_text("utf-8")
        assert set(tomllib.loads(text)) <= names, path.name
        assert not [line for line in text.splitlines() if "=" in line and "#" not in line], path.name


def commands() -> Iterator[tuple[str, str]]:
    """(page, command line) of every `python generate.py ...` in a code block of a page."""
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"\s*(\S*python3?) generate(_optimized)?\.py", line):
                    yield page.relative_to(ROOT).as_posix(), line.strip()


def test_commands_in_the_documentation_parse() -> None:
    found = list(commands())
    assert any(page == "README.md" for page, _ in found)
    for page, line in found:
        words = shlex.split(line.partition("  #")[0])
        if words[2:] == ["..."]:
            continue
        try:
            cli.parse(words[2:], options(registry()))
        except ValueError as error:
            pytest.fail(f"{page}: {line}: {error}")


def test_make_targets_named_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    named = {
        target for page in PAGES for target in re.findall(r"(?:^|`)make ([a-z]+)", code_of(page), flags=re.MULTILINE)
    }
    assert named <= targets


def code_of(page: Path) -> str:
    text = page.read_text("utf-8")
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


def test_library_and_pinned_requirements_name_the_same_packages() -> None:
    """setup.py holds ranges for users of the library, requirements.txt the versions the tests run with."""
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text("utf-8"), flags=re.MULTILINE))
    declared = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text("utf-8"), flags=re.DOTALL)
    assert declared is not None
    assert pinned == set(re.findall(r'"([\w-]+)>=', declared[1]))
