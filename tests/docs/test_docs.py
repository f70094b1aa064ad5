"""The pages: their links, their code, their commands, their figures, and the site made of them."""

import ast
import builtins
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from nnunet_deform import cli
from nnunet_deform.trainers.variants import find_trainer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*sorted(ROOT.glob("*.md")), *PAGES, ROOT / "nnunet_deform" / "ops" / "README.md"]
NAMES = [str(path.relative_to(ROOT)) for path in TEXTS]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", lambda m: "`code`", text, flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """As GitHub and the site make them of headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h)).strip().lower() for h in headings)
    return {heading.replace(" ", "-") for heading in plain}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.M | re.S)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("path", TEXTS, ids=NAMES)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(((?!https?:|mailto:)[^)\s]+)\)", without_code(path.read_text())):
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{target} in {path}"
        if anchor and "/api/" not in str(found):  # what mkdocstrings makes is checked by the build
            assert anchor in anchors(found), f"{target} in {path}"


def test_the_sites_menu_has_every_page():
    menu = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(menu) == sorted(str(path.relative_to(DOCS)) for path in PAGES)


def free_names(tree: ast.AST) -> set[str]:
    """Names that a piece of code uses and does not make."""
    nodes = list(ast.walk(tree))
    made = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    made |= {
        a.asname or a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
    }
    made |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    made |= {n.arg for n in nodes if isinstance(n, ast.arg)} | set(dir(builtins))
    return {n.id for n in nodes if isinstance(n, ast.Name)} - made


def python_blocks() -> Iterator[tuple[str, str]]:
    for path in TEXTS:
        for number, block in enumerate(blocks(path, "python")):
            yield f"{path.relative_to(ROOT)}, {number + 1}", block


@pytest.mark.parametrize("block", [pytest.param(block, id=name) for name, block in python_blocks()])
def test_python_blocks_run(block, tmp_path, monkeypatch):
    """Whole ones; of fragments, which need a trained network or its files, what they import exists."""
    monkeypatch.chdir(tmp_path)
    tree = ast.parse(block)
    if not free_names(tree) and '.onnx"' not in block:
        exec(compile(tree, "block", "exec"), {"__name__": "block"})
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_some_blocks_are_whole():
    whole = [name for name, block in python_blocks() if not free_names(ast.parse(block))]
    assert {"docs/operators.md, 2", "docs/own_network.md, 1"} <= set(whole)


def commands(program: str) -> list[str]:
    """What the pages tell a reader to type, once each."""
    found = {}
    for path in TEXTS:
        for block in blocks(path, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            for part in (part.strip() for line in lines for part in re.split(r"&&|\|", line)):
                if part.startswith(f"{program} ") or part == program:
                    found[part.partition(" #")[0].strip()] = None
    return list(found)


@pytest.mark.parametrize("command", commands("nnunet-deform"))
def test_our_commands_are_understood(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    group, words = typer.main.get_command(cli.app), shlex.split(command)[1:]
    while hasattr(group, "commands"):
        group, words = group.commands[words[0]], words[1:]
    if group.name == "check-images":  # the only one that asks for a folder before it starts
        Path(words[0]).mkdir(parents=True)
    group.make_context("", words)


@pytest.mark.parametrize("command", commands("nnUNetv2_train"))
def test_the_trainers_of_the_commands_exist(command):
    words = shlex.split(command)
    if "-tr" not in words:
        assert "-p" in words
        return
    name = words[words.index("-tr") + 1]
    if name.startswith("nnUNetTrainerSmall"):  # of own_network.md
        return
    assert find_trainer(name).__name__ == name


def test_the_figures_are_drawn_from_what_is_committed():
    drawn = runpy.run_path(str(DOCS / "figures" / "draw.py"))["FIGURES"]
    assert {f"{name}.svg" for name in drawn} == {path.name for path in (DOCS / "figures").glob("*.svg")}
    for name, draw in drawn.items():
        assert draw().svg() == (DOCS / "figures" / f"{name}.svg").read_text(), f"run docs/figures/draw.py ({name})"


def test_the_ladder_is_the_one_that_is_checked():
    contract, *_ = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    checked = [{name.removeprefix("nnunet_deform.") for name in layer.split(" | ")} for layer in contract["layers"]]
    drawn = runpy.run_path(str(DOCS / "figures" / "draw.py"))["LADDER"]
    assert [set(names.split(", ")) for names, _ in drawn] == checked


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra 'docs'")
    pytest.importorskip("mkdocstrings", reason="needs the extra 'docs'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # which is about the theme's own future
    result = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    page = (tmp_path / "api" / "ops" / "index.html").read_text()
    assert 'id="nnunet_deform.ops.deform_conv3d"' in page
    assert not re.search(r":(class|func|mod|meth|math):|math::", page)
    home = (tmp_path / "index.html").read_text()
    assert 'href="networks/lightmedseg/#size-and-cost"' in home
