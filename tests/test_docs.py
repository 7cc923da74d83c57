"""The pages' code runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page.read_text(), str(page))


@pytest.mark.parametrize("section", ["4-bit (QLoRA)", "The family"])
def test_code_of_the_readme_runs(section: str) -> None:
    run((ROOT / "README.md").read_text().split(f"## {section}")[1].split("\n## ")[0], section)


def run(text: str, name: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    exec(compile("\n".join(blocks), name, "exec"), {"__name__": "__main__"})
