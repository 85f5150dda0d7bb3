"""The two folders beside the package install as parts of it, and as nothing else."""

import importlib.metadata
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("compile", "masks")


@pytest.mark.parametrize("folder", FOLDERS)
def test_link_points_at_the_real_folder(folder: str) -> None:
    link = ROOT / "moba_flex" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..", folder)
    assert not (ROOT / folder).is_symlink()


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        # Import of PyTorch's compiler takes longer than that of PyTorch.
        ("import moba_flex", {"torch._dynamo", "torch._inductor", "triton", "sympy"}),
        ("from moba_flex import *", {"compile", "masks", "transformers"}),
    ],
)
def test_import_is_light_and_makes_no_stray_modules(code: str, unwanted: set[str]) -> None:
    code = f"import sys; {code}; print(*{unwanted} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_package_says_that_it_is_typed() -> None:
    assert files("moba_flex").joinpath("py.typed").is_file()


PAGES = (
    "README.md",
    "CHANGELOG.md",
    ".github/ARCHITECTURE.md",
    ".github/CONTRIBUTING.md",
    "perf/experiments/README.md",
    "perf/results/README.md",
)


@pytest.mark.parametrize("name", PAGES)
def test_links_between_pages_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            assert anchor in [head.lower().replace(" ", "-") for head in heads], link


@pytest.mark.slow
def test_readme_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "readme.py"
    script.write_text("".join(block for block in blocks if "from_pretrained" not in block))
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(script))
    assert names["q"].grad.isfinite().all()
    assert names["out"].isfinite().all()


def test_changelog_begins_with_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == project["version"]


def test_metadata() -> None:
    try:
        distribution = importlib.metadata.distribution("moba-flex")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs moba-flex installed, as nox does")
    metadata = distribution.metadata
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_all("Provides-Extra") == ["hf", "plot"]
    assert distribution.requires is not None
    assert [line for line in distribution.requires if "extra" not in line] == ["torch>=2.11"]
    assert (distribution.read_text("top_level.txt") or "").split() == ["moba_flex"]
    (script,) = distribution.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("moba-flex", "moba_flex.__main__:main")
