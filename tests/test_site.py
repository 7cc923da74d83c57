"""The documentation site: every page is in its navigation, every public name in its reference, and its links lead somewhere."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_ops
import lora_ops.distributed

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "tools"))

from docs_hooks import LINK, page_of, part_of  # noqa: E402

PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
MODULES = ("compose", "factors", "init", "methods", "optim")


def documented() -> list[str]:
    text = "\n".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    return re.findall(r"^::: ([\w.]+)$", text, re.M)


def found(name: str) -> object:
    """What a dotted name of the package is, modules imported on the way."""
    head, *rest = name.split(".")
    thing: object = importlib.import_module(head)
    for i, part in enumerate(rest):
        if not hasattr(thing, part):
            importlib.import_module(".".join([head, *rest[: i + 1]]))
        thing = getattr(thing, part)
    return thing


def test_every_page_is_in_the_navigation_once() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1].split("\n\n")[0]
    assert sorted(re.findall(r"([\w./]+\.md)$", nav, re.M)) == PAGES


def test_every_public_name_is_in_the_reference_once() -> None:
    public = {f"lora_ops.{name}" for name in lora_ops.__all__} - {"lora_ops.__version__", "lora_ops.reference"}
    for module in MODULES:
        public.remove(f"lora_ops.{module}")
        public |= {f"lora_ops.{module}.{name}" for name in getattr(lora_ops, module).__all__}
    tree = ast.parse((ROOT / "lora_ops" / "reference.py").read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}
    public |= {f"lora_ops.reference.{name}" for name in functions}
    names = documented()
    assert len(names) == len(set(names))
    assert {name for name in names if ".integrations." not in name and ".distributed." not in name} == public
    distributed = {name for name in names if ".distributed." in name}
    assert distributed == {f"lora_ops.distributed.{name}" for name in lora_ops.distributed.__all__}


def test_what_the_reference_names_exists_and_has_a_docstring() -> None:
    undocumented = [name for name in documented() if not getattr(found(name), "__doc__", None)]
    assert not undocumented


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """From the page as the site has it, with what is taken from other files; and from those files themselves."""
    folder = (DOCS / page).parent
    text = page_of((DOCS / page).read_text(), folder)
    assert "<!-- from" not in text
    for _, target, _ in LINK.findall(text):
        assert DOCS in (folder / target).resolve().parents, target
        assert (folder / target).exists(), target
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (folder / target).exists(), target


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{page}" for page in PAGES)])
def test_links_of_the_files_lead_somewhere(file: str) -> None:
    for _, target, _ in LINK.findall((ROOT / file).read_text()):
        assert ((ROOT / file).parent / target).exists(), target


def test_links_on_the_site() -> None:
    """To a page, with its anchor; to a file that the site does not have; from a text that stands in another folder."""
    page = DOCS / "study"
    assert page_of("[a](../cuda.md#two-paths) [b](../../tests/compare.py) ![c](d.png)", page) == (
        "[a](../cuda.md#two-paths) b (`tests/compare.py`) ![c](d.png)"
    )
    shown = page_of("<!-- from CHANGELOG.md -->", DOCS)
    assert "[docs/study](study/README.md)" in shown and "](docs/" not in shown


def test_a_part_of_a_file() -> None:
    text = "# T\n\n## One\n\na\n\n<!-- x:begin -->\nb\n<!-- x:end -->\n\n## Two\n\nc\n"
    assert part_of(text, "x") == "b"
    assert part_of(text, "Two") == "c"
    assert part_of(text, "One").startswith("a\n")
    with pytest.raises(ValueError, match="'Three'"):
        part_of(text, "Three")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed (make docs installs it)")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page in PAGES:
        name = page.removesuffix(".md").removesuffix("README").removesuffix("index")
        assert (tmp_path / name / "index.html").exists(), page
    assert "The mask is never stored" in (tmp_path / "api" / "operators" / "index.html").read_text()
