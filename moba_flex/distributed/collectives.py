"""Collectives with gradients, and agreement between ranks before they are called.

Gradients of gathered tensors travel by an all-to-all and are added in the order of the ranks, in
float32 at least. The sum is therefore the same in every run, which a reduce-scatter promises on no
backend, and 16-bit gradients are rounded once.
"""

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup | DeviceMesh | None
"""The ranks that share work; None for all, as in `torch.distributed`."""

Made = TypeVar("Made")

# PyTorch 2.13 gave it a new name, and warns of the old one.
_all_gather: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)


def process_group(group: Any) -> dist.ProcessGroup:
    """Return the process group of `group`: itself, that of a mesh of one dimension, or of all.

    Raises:
        TypeError: It is neither a process group nor a mesh.
        ValueError: The mesh has several dimensions, this process is not in the group, or there is
            no group yet.
    """
    if group is None:
        group = dist.group.WORLD
        if group is None:
            raise ValueError(
                "group must exist, got None before torch.distributed.init_process_group: call it"
            )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a mesh of 1 dimension, got {group.ndim}: index the mesh by the "
                "name of one"
            )
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must hold this rank, got one without it: call it on its ranks")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}: pass None "
            "for all ranks"
        )
    return group


def agree(
    group: dist.ProcessGroup, describe: Callable[[], tuple[int, dict[str, Any], Made]]
) -> tuple[list[int], Made]:
    """Return the length of every rank and what `describe` made, if all ranks say the same.

    All ranks take part, also those on which `describe` raises, so that no rank is left waiting.

    Args:
        group: The ranks.
        describe: Checks the arguments, and returns a length, which may differ from rank to rank;
            what must be equal on all ranks, by name; and a result for the caller.

    Raises:
        ValueError: Another rank says something else, or raised an error.
        Exception: What `describe` raised on this rank.
    """
    error: Exception | None = None
    try:
        length, facts, made = describe()
        facts = {name: _as_text(value) for name, value in facts.items()}
    except Exception as raised:
        length, facts, error = 0, {}, raised
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big", signed=True)
    mine = torch.tensor([number, length, int(error is not None)], device=_device_of(group))
    every = mine.new_empty(group.size() * 3)
    _all_gather(every, mine, group=group)
    digests, lengths, failures = every.view(-1, 3).T.tolist()
    if any(failures) or len(set(digests)) > 1:
        said: list[Any] = [None] * group.size()
        dist.all_gather_object(said, (facts, None if error is None else str(error)), group=group)
        raise error or _disagreement(said)
    return lengths, made


def _disagreement(said: Sequence[tuple[dict[str, str], str | None]]) -> ValueError:
    """Return the error of a rank whose own arguments are right."""
    for rank, (_, error) in enumerate(said):
        if error is not None:
            return ValueError(
                f"arguments must be right on every rank, got an error on rank {rank}: {error}"
            )
    values = {name: [facts.get(name) for facts, _ in said] for name in said[0][0]}
    name = next(name for name, of_ranks in values.items() if len(set(of_ranks)) > 1)
    given = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values[name]))
    return ValueError(
        f"{name} must be the same on every rank, got {given}: call it alike everywhere"
    )


def _as_text(value: Any) -> str:
    """Return a value as text that is equal if and only if the value is."""
    if isinstance(value, Tensor):
        x = value.detach().cpu().contiguous()
        content = ctypes.string_at(x.data_ptr(), x.nbytes) if x.nbytes else b""
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        return f"a Tensor of shape {tuple(x.shape)}, {x.dtype}, with contents {digest}"
    return "a function" if callable(value) else repr(value)


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Return where small tensors of a group lie: on CPU if they can, which waits for no GPU."""
    config = str(dist.get_backend_config(group))
    if "cpu:" in config:
        return torch.device("cpu")
    return torch.device(config.split(":")[0], torch.accelerator.current_device_index())


def swap(
    parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], group: dist.ProcessGroup
) -> list[Tensor]:
    """Send a part to each rank, and return what each rank sends; differentiable.

    Args:
        parts: What goes to each rank, of one dtype.
        shapes: The shape of what comes from each rank.
        group: The ranks.
    """
    flat = torch.cat([x.reshape(-1) for x in parts])
    sizes = [x.numel() for x in parts], [prod(shape) for shape in shapes]
    got: Tensor = _AllToAll.apply(flat, *sizes, group)  # type: ignore[no-untyped-call]
    received = got.split(sizes[1])
    return [x.view(shape) for x, shape in zip(received, shapes, strict=True)]


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the tensors `x` of all ranks, which have one shape, as `[W, ...]`; differentiable."""
    every: Tensor = _AllGather.apply(x, group)  # type: ignore[no-untyped-call]
    return every


class _AllToAll(torch.autograd.Function):
    """Numbers `[n]` cut into parts, one for each rank."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.call = receive, send, group
        return _all_to_all(x, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, *ctx.call), None, None, None


class _AllGather(torch.autograd.Function):
    """Tensors of one shape from all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        every = x.new_empty((group.size(), *x.shape))
        _all_gather(every.view(-1), x.contiguous().view(-1), group=group)
        return every

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        group: dist.ProcessGroup = ctx.group
        sizes = [grad[0].numel()] * group.size()
        shares = _all_to_all(grad.reshape(-1), sizes, sizes, group).view(grad.shape)
        exact = torch.promote_types(grad.dtype, torch.float32)
        return shares.sum(0, dtype=exact).to(grad.dtype), None


def _all_to_all(
    x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
) -> Tensor:
    got = x.new_empty(sum(receive))
    dist.all_to_all_single(got, x.contiguous(), receive, send, group=group)
    return got
