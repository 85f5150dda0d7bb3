"""The metadata of packages, and loading."""

import importlib.metadata
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moba_flex.compile.outside import check_device, reason

MOST_TOKENS = 2**20
"""The longest input of a package of dynamic length."""

_KEY = "moba_flex"
_FORMAT = 2
_Device = torch.device  # within `Metadata`, "torch" is an attribute
_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # each also runs code for those before it


@dataclass(frozen=True)
class Spec:
    """An input of a package.

    Attributes:
        name: Its name in the module.
        shape: Its sizes; a size that varies is its symbol, its least and its most. Sizes with the
            same symbol are equal.
        dtype: Its dtype, such as "float32".
    """

    name: str
    shape: tuple[int | tuple[str, int, int], ...]
    dtype: str

    @property
    def varying(self) -> list[tuple[str, int, int]]:
        """The sizes that vary."""
        return [size for size in self.shape if not isinstance(size, int)]


@dataclass(frozen=True)
class Metadata:
    """The metadata of a package.

    Attributes:
        moba_flex: The version that wrote it.
        torch: The version of PyTorch that compiled it.
        device: "cpu" or "cuda".
        capability: The instructions that it uses: `torch.backends.cpu.get_cpu_capability()`, or
            the compute capability of a CUDA device.
        attention: For each kind of attention call its plan, its options and the number of calls.
        inputs: The inputs.
    """

    moba_flex: str
    torch: str
    device: str
    capability: str
    attention: list[dict[str, Any]]
    inputs: list[Spec]

    @classmethod
    def of(
        cls, attention: list[dict[str, Any]], inputs: list[Spec], device: _Device
    ) -> "Metadata":
        """Return the metadata of a package made by this process."""
        return cls(
            moba_flex=own_version(),
            torch=torch.__version__,
            device=device.type,
            capability=_capability(device),
            attention=attention,
            inputs=inputs,
        )

    def to_strings(self) -> dict[str, str]:
        """Return the metadata as AOTInductor stores it."""
        return {_KEY: json.dumps({"format": _FORMAT, **asdict(self)})}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> "Metadata":
        """Return the metadata that `to_strings` stored.

        Raises:
            ValueError: The format is that of another version.
        """
        fields = json.loads(strings[_KEY])
        if fields.pop("format") != _FORMAT:
            raise ValueError("another version of moba_flex wrote it")
        specs = [
            Spec(x["name"], tuple(_size(size) for size in x["shape"]), x["dtype"])
            for x in fields.pop("inputs")
        ]
        return cls(inputs=specs, **fields)


class Package:
    """A loaded package: call it with the inputs of the module.

    Attributes:
        metadata: The metadata of the package.
        device: The device that it runs on.
    """

    def __init__(self, run: Any, metadata: Metadata, device: torch.device) -> None:
        self.metadata = metadata
        self.device = device
        self._run = run

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the package; inputs that are not contiguous are copied.

        Raises:
            TypeError: An input has another dtype, or there are too many or too few.
            ValueError: An input has a shape that the package does not take, or is on another
                device.
        """
        specs = self.metadata.inputs
        if len(inputs) != len(specs):
            raise TypeError(f"inputs must be {len(specs)}, got {len(inputs)}")
        sizes: dict[str, int] = {}
        for x, spec in zip(inputs, specs, strict=True):
            _check_input(x, spec, self.device, sizes)
        with torch.no_grad(), torch.cuda.device_of(inputs[0]):  # running may change the device
            return self._run(*(x.contiguous() for x in inputs))


def load(path: str | os.PathLike[str], *, device: str | torch.device | None = None) -> Package:
    """Load a package that `export` made.

    A package is machine code that runs with the rights of the caller: load only trusted ones.

    Args:
        path: The package.
        device: The device to run on, such as one of several CUDA devices; if None, the current one
            of the package's kind.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or no package of moba_flex, or this machine or this PyTorch
            cannot run it, or `device` is of another kind than the package's.

    Example:
        >>> load("attention.pt2")  # which `export` has not written here
        Traceback (most recent call last):
        FileNotFoundError: path must be a file, got 'attention.pt2'
    """
    metadata = read_metadata(path)
    release, needed = (".".join(x.split(".")[:2]) for x in (torch.__version__, metadata.torch))
    if release != needed:
        raise ValueError(
            f"PyTorch must be {needed} for {os.fspath(path)!r}, got {torch.__version__}: "
            "export the module again, or change PyTorch"
        )
    if metadata.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"machine must have a CUDA device for {os.fspath(path)!r}, got none: "
            "export the module for cpu"
        )
    place = check_device(metadata.device if device is None else device)
    if place.type != metadata.device:
        raise ValueError(
            f"device must be {metadata.device} for {os.fspath(path)!r}, got {place}: "
            f"export the module for {place.type}"
        )
    index = -1
    if place.type == "cuda":
        index = torch.cuda.current_device() if place.index is None else place.index
        place = torch.device("cuda", index)
    has = _capability(place)
    if not _runs(metadata.capability, has):
        raise ValueError(
            f"{metadata.device} must have {metadata.capability} for {os.fspath(path)!r}, "
            f"got {has}: "
            "export the module on a machine like this"
        )
    try:
        with torch.cuda.device(index):  # loading changes the current device
            run = torch._inductor.aoti_load_package(os.fspath(path), device_index=index)
    except Exception as error:
        raise ValueError(
            f"path must be a package that PyTorch can load, got {os.fspath(path)!r}: "
            f"{reason(error)}: export it again on this machine"
        ) from error
    return Package(run, metadata, place)


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """Read the metadata of a package, without running any of its code.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or no package of moba_flex.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"path must be a file, got {str(path)!r}")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            texts = [
                archive.read(name)
                for name in archive.namelist()
                if "/data/aotinductor/" in name and name.endswith("_metadata.json")
            ]
    except Exception as error:  # damaged files raise errors of many classes, some of zlib
        raise ValueError(
            f"path must be a whole .pt2 package, got {str(path)!r}: {reason(error)}: "
            "copy or export it again"
        ) from error
    if damaged is not None:
        raise ValueError(
            f"path must be a whole .pt2 package, got {str(path)!r} with a damaged {damaged!r}: "
            "copy or export it again"
        )
    for text in texts:
        strings = json.loads(text)
        if _KEY in strings:
            return Metadata.from_strings(strings)
    raise ValueError(
        f"path must be a package that moba_flex.compile.export made, got {str(path)!r}, "
        "which carries no moba_flex metadata: load others by torch._inductor.aoti_load_package"
    )


def _check_input(x: Tensor, spec: Spec, device: torch.device, sizes: dict[str, int]) -> None:
    """Raise unless an input fits `spec`; `sizes` holds the sizes of the symbols met so far."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{spec.name} must be a Tensor, got {type(x).__name__}")
    if str(x.dtype) != f"torch.{spec.dtype}":
        raise TypeError(f"{spec.name} must be torch.{spec.dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{spec.name} must be on {device}, got {x.device}")
    if x.dim() != len(spec.shape):
        raise ValueError(
            f"{spec.name} must have {len(spec.shape)} dimensions, got shape {tuple(x.shape)}"
        )
    for dim, (size, want) in enumerate(zip(x.shape, spec.shape, strict=True)):
        least, most = (want, want) if isinstance(want, int) else want[1:]
        if not least <= size <= most:
            need = least if least == most else f"{least} to {most}"
            raise ValueError(
                f"{spec.name} must have size {need} in dimension {dim}, got {size}"
                f"{_remedy(x, dim) if isinstance(want, int) else ''}"
            )
        if not isinstance(want, int) and sizes.setdefault(want[0], size) != size:
            raise ValueError(
                f"{spec.name} must have size {sizes[want[0]]} in dimension {dim}, like the inputs "
                f"before it, got {size}"
            )


def _remedy(x: Tensor, dim: int) -> str:
    """Return the option of `export` that makes this dimension vary, as the end of a message."""
    if x.dim() > 1 and dim == 0:
        return ": export with dynamic_batch=True"
    if x.dim() > 1 and dim == length_dim(x):
        return ": export with dynamic_length=True"
    return ""


def length_dim(x: Tensor) -> int:
    """Return which dimension of an input is its length."""
    return 2 if x.dim() == 4 else 1


def _size(size: Any) -> int | tuple[str, int, int]:
    return size if isinstance(size, int) else (size[0], size[1], size[2])


def _capability(device: torch.device) -> str:
    if device.type == "cuda":
        return ".".join(map(str, torch.cuda.get_device_capability(device)))
    return torch.backends.cpu.get_cpu_capability()


def _runs(needed: str, has: str) -> bool:
    """Whether a device of capability `has` runs code for `needed`."""
    if needed in _CAPABILITIES and has in _CAPABILITIES:
        return _CAPABILITIES.index(has) >= _CAPABILITIES.index(needed)
    return needed == has


def own_version() -> str:
    """Return the version of moba_flex."""
    try:
        return importlib.metadata.version("moba-flex")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
