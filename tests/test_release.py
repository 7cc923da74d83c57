"""What is released: the source distribution has what a build and the tests need, and the version has one source."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lora_ops

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import check_wheel  # noqa: E402

SDIST = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
FOLDERS = ("bench", "csrc", "docs", "examples", "lora_ops", "tests", "tools")
WRITTEN = {".so", ".pyc"}


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The paths in the source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    done = subprocess.run([sys.executable, "-c", SDIST, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    assert archive.name == f"lora_ops-{lora_ops.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        return {member.name.split("/", 1)[1] for member in tar.getmembers() if member.isfile()}


def test_the_source_distribution_is_the_source(distributed: set[str]) -> None:
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    ours = {p.relative_to(ROOT).as_posix() for p in files if p.is_file() and p.suffix not in WRITTEN}
    assert {name for name in distributed if name.split("/")[0] in FOLDERS} == ours
    top = {"pyproject.toml", "setup.py", "Makefile", "mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    assert top <= distributed


def test_the_version_is_the_changelogs_newest() -> None:
    versions = re.findall(r"^## \[([^]]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0][0] == lora_ops.__version__
    assert all(re.fullmatch(r"unreleased|\d{4}-\d\d-\d\d", day) for _, day in versions)


def test_the_wheel_is_tried_beside_the_oldest_torch_that_is_promised() -> None:
    (floor,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert check_wheel.TORCHES[0] == f"{floor}.0"
    assert f"every torch from {floor} on" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"lora_ops.libs/libgomp-1.so.1": b""}, "no other library"),
        ({"lora_ops/_C.so": b"libgomp-1.so.1\0"}, "must be linked"),
        ({"lora_ops/py.typed": None}, "lacks .'lora_ops/py.typed'"),
        ({"tests/a.py": b""}, "should not have .'tests/a.py'"),
    ],
)
def test_a_wheel_with_anything_else_is_refused(tmp_path: Path, changed: dict[str, bytes | None], message: str | None) -> None:
    files = {
        "lora_ops/_C.so": b"libgomp.so.1\0",
        "lora_ops/_C.pyi": b"",
        "lora_ops/py.typed": b"",
        "lora_ops-1.dist-info/R": b"",
    }
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**files, **changed}.items():
            if content is not None:
                archive.writestr(name, content)
    if message is None:
        check_wheel.check_contents(wheel)
    else:
        with pytest.raises(SystemExit, match=message):
            check_wheel.check_contents(wheel)
