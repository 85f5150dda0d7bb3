"""Real text and code that every machine has: the sources and documents of Python packages.

A package lies wholly in training or wholly in validation, contents that repeat are taken once, and
validation files of which many lines occur in training are left out.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from perf.experiments.files import lock, save

Tokens = Literal["bytes", "smollm2"]

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
SIZES = range(256, 512 * 1024)  # bytes of a file; larger ones are tables
VALIDATION = 1 / 20  # of the training bytes
LARGEST = 1 / 4  # of validation that one package may be
SHARED_LINES = 1 / 5  # of the long lines of a validation file that may occur in training
LONG_LINE = 30  # characters; shorter lines recur everywhere


@dataclass(frozen=True)
class Corpus:
    """Tokens of training and of validation, files one after another.

    Attributes:
        train: Tokens, `[T]`.
        validation: Tokens, `[T]`.
        vocab_size: Number of different tokens.
        facts: For the results: tokens, files, packages and a checksum of both parts, and the share
            of the long lines of validation that occur in training.
    """

    train: Tensor
    validation: Tensor
    vocab_size: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class File:
    """A text and the package that it belongs to."""

    package: str
    path: Path
    text: str


def load_corpus(
    tokens: Tokens, folder: Path, megabytes: int = 48, roots: Sequence[Path] | None = None
) -> Corpus:
    """Return the corpus from its file in `folder`, which is written if there is none.

    Args:
        tokens: "bytes", or "smollm2" for the tokenizer of the default model of `moba-flex`.
        folder: Where the file lies.
        megabytes: Most text of training.
        roots: Folders of packages; those of this Python if None.
    """
    path = folder / f"corpus-{tokens}-{megabytes}.pt"
    with lock(path.with_suffix(".lock")):
        if not path.exists():
            save(vars(make_corpus(tokens, megabytes, roots or python_roots())), path)
    return Corpus(**torch.load(path))


def make_corpus(tokens: Tokens, megabytes: int, roots: Sequence[Path]) -> Corpus:
    """Read packages, split them and encode both parts; see `load_corpus`."""
    train, validation = split(read_files(roots), megabytes * 10**6)
    parts = [encode(files, tokens) for files in (train, validation)]
    facts: dict[str, Any] = {
        f"{name}_{fact}": value
        for name, files, (ids, _) in zip(
            ("train", "validation"), (train, validation), parts, strict=True
        )
        for fact, value in {
            "tokens": len(ids),
            "files": len(files),
            "packages": len({file.package for file in files}),
            "sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16],
        }.items()
    }
    leaked = shared_lines("\n".join(file.text for file in validation), known_lines(train))
    facts["validation_lines_in_train"] = round(leaked, 5)
    return Corpus(parts[0][0], parts[1][0], parts[0][1], {"tokens": tokens, **facts})


def python_roots() -> list[Path]:
    """Return the folders of this Python's standard library and installed packages."""
    names = ("stdlib", "purelib", "platlib")
    return list(dict.fromkeys(Path(sysconfig.get_path(name)).resolve() for name in names))


def read_files(roots: Iterable[Path]) -> list[File]:
    """Return the text files of packages, each content once, in the order of packages and paths."""
    seen: set[str] = set()
    files = []
    for root in roots:
        for path in tqdm(sorted(_paths(root)), desc=f"read {root.name}", leave=False):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):  # tests of encodings, dangling links
                continue
            content = hashlib.sha256("".join(text.split()).encode()).hexdigest()
            if content not in seen:
                seen.add(content)
                package = path.relative_to(root).parts[0].removesuffix(path.suffix)
                files.append(File(package, path, text))
    return files


def _paths(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if name not in ("site-packages", "dist-packages", "__pycache__")
            and not name.endswith((".dist-info", ".egg-info"))  # repeat a package's README
        ]
        for name in names:
            path = Path(folder, name)
            if path.suffix in SUFFIXES and path.is_file() and path.stat().st_size in SIZES:
                yield path


def split(files: list[File], most: int) -> tuple[list[File], list[File]]:
    """Return the files of training and those of validation.

    Packages are taken in the order of a hash of their names, so that the split is the same in
    every run; first as many as validation needs, then those of training.

    Args:
        files: All files.
        most: Most characters of training.
    """
    packages: dict[str, list[File]] = {}
    for file in files:
        packages.setdefault(file.package, []).append(file)
    sizes = {name: sum(len(x.text) for x in these) for name, these in packages.items()}
    wanted = VALIDATION * min(most, sum(sizes.values()))
    train: list[File] = []
    validation: list[File] = []
    taken = {"train": 0, "validation": 0}
    for name in sorted(packages, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[name] <= LARGEST * wanted and taken["validation"] < wanted:
            validation += packages[name]
            taken["validation"] += sizes[name]
            continue
        for file in packages[name]:
            if taken["train"] + len(file.text) <= most:
                train.append(file)
                taken["train"] += len(file.text)
    known = known_lines(train)
    validation = [file for file in validation if shared_lines(file.text, known) <= SHARED_LINES]
    for name, found in (("train", train), ("validation", validation)):
        if not found:
            raise ValueError(f"{name} must have files, got none of {len(files)}: add packages")
    return train, validation


def long_lines(text: str) -> list[str]:
    """Return the lines that say something."""
    return [line for x in text.splitlines() if len(line := x.strip()) >= LONG_LINE]


def known_lines(files: Iterable[File]) -> set[str]:
    """Return the long lines of files."""
    return {line for file in files for line in long_lines(file.text)}


def shared_lines(text: str, known: set[str]) -> float:
    """Return the share of a text's long lines that are known."""
    lines = long_lines(text)
    return sum(line in known for line in lines) / max(1, len(lines))


def encode(files: Sequence[File], tokens: Tokens) -> tuple[Tensor, int]:
    """Return the tokens of files with separators between, and the size of the vocabulary."""
    if tokens == "bytes":
        text = b"\0".join(file.text.encode() for file in files)
        return torch.frombuffer(bytearray(text), dtype=torch.uint8), 256
    from moba_flex.cli.pretrained import load_tokenizer

    tokenizer = load_tokenizer()
    ids: list[int] = []
    for start in tqdm(range(0, len(files), 256), desc="tokenize", leave=False):
        texts = [file.text for file in files[start : start + 256]]
        for row in tokenizer(texts, verbose=False, add_special_tokens=False).input_ids:
            ids += [*row, tokenizer.eos_token_id]
    return torch.tensor(ids, dtype=torch.int32), len(tokenizer)


def draw_windows(tokens: Tensor, batch: int, length: int, seed: int, step: int) -> Tensor:
    """Return windows at random places, int64 `[batch, length]`, the same for equal arguments."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    most = _starts(tokens, length)
    starts = torch.randint(most, (batch,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()]).long()


def even_windows(tokens: Tensor, count: int, length: int) -> Tensor:
    """Return windows at even distances, int64 `[count, length]`."""
    starts = torch.linspace(0, _starts(tokens, length) - 1, count).long()
    return torch.stack([tokens[start : start + length] for start in starts.tolist()]).long()


def _starts(tokens: Tensor, length: int) -> int:
    if len(tokens) < length:
        raise ValueError(f"corpus must have at least {length} tokens, got {len(tokens)}")
    return len(tokens) - length + 1
