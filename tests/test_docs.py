"""What README.md and docs/ say is so: Python examples run, commands and their options exist, links lead
somewhere.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:\A|(?<=\n\n))((?: {4}.*\n)+)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    found = _FENCED.findall(page.read_text(encoding="utf-8"))
    return [text for language, text in found if language in languages]


def shell_lines(page: Path) -> list[str]:
    """Commands of fenced sh blocks and of indented ones, continued lines joined, comments gone."""
    plain = _FENCED.sub("", page.read_text(encoding="utf-8"))
    texts = [*blocks(page, "sh"), *_INDENTED.findall(plain)]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip()]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in _HEADING.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """In order, in one directory, a fresh namespace for each; in a process of their own, for they train."""
    found = blocks(page, "python")
    for index, block in enumerate(found):
        (tmp_path / f"block_{index}.py").write_text(block, encoding="utf-8")
    if not found:
        assert page.name != "README.md"
        return
    run = "import runpy, sys\nfor name in sys.argv[1:]:\n    print(name, flush=True)\n    runpy.run_path(name)"
    result = subprocess.run(
        [sys.executable, "-c", run, *(f"block_{index}.py" for index in range(len(found)))],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    import typer.main

    from umda_fast.cli.app import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):  # variables set for the command
            words = words[1:]
        if words[:1] == ["umda-fast"] and words[1:] != ["--help"]:
            assert words[1] in known, line
            options = {option for parameter in known[words[1]].params for option in parameter.opts}
            used = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
            assert used <= options, f"{line}: {sorted(used - options)}"
        elif words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= set(targets), line
        elif words[:2] == ["python", "-m"] and words[2].startswith(("bench.", "tests.")):
            assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file(), line
        elif words[:1] == ["python"] and words[1:] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_code_exist(page: Path) -> None:
    """Paths such as `umda_fast/errors.py`; those with a <placeholder> name a directory that exists."""
    for name in re.findall(r"`((?:umda_fast|kernels|csrc|tests|bench|examples|docs)/[^`\s]*)`", page.read_text()):
        path = name.split("<")[0]
        if name.endswith(".so") or "{" in name:  # built, not in the repository
            continue
        assert (ROOT / path).exists() or ("<" in name and (ROOT / path).parent.is_dir()), name
