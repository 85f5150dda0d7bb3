"""Tensor parallelism: each rank attends with its own heads."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.nn.attention.flex_attention import AuxOutput

from moba_flex.module import MoBAAttention


class HeadParallel(ParallelStyle):
    """Tensor parallelism of a `MoBAAttention`: each rank attends with its own heads.

    Heads are independent of each other, so that nothing is communicated. The module takes q, k and
    v as local tensors of this rank's heads, or as DTensors sharded by heads, `Shard(1)`, which it
    turns into local ones. Of `head_top_k` each rank keeps the numbers of its heads.

    Args:
        use_local_output: Whether the output is a local tensor; else a DTensor sharded by heads.

    Raises:
        TypeError: The module is no `MoBAAttention`.
        ValueError: Heads cannot be shared among the ranks, or a DTensor is sharded otherwise.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> model = torch.nn.ModuleDict({"attention": MoBAAttention(block_size=64, top_k=2)})
        >>> model = parallelize_module(model, mesh, {"attention": HeadParallel()})
        >>> q, k, v = torch.randn(3, 1, 4, 256, 32)
        >>> model["attention"](q, k, v).shape
        torch.Size([1, 4, 256, 32])
        >>> dist.destroy_process_group()
    """

    def __init__(self, *, use_local_output: bool = True) -> None:
        super().__init__()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, MoBAAttention):
            raise TypeError(
                f"module must be a MoBAAttention, got {type(module).__name__}: name it in the plan"
            )
        size, rank = device_mesh.size(), device_mesh.get_local_rank()
        if (numbers := module.head_top_k) is not None:
            if len(numbers) % size:
                raise _unshared("head_top_k", "numbers", size, len(numbers))
            heads = len(numbers) // size
            module.head_top_k = numbers[rank * heads : (rank + 1) * heads]
        hook = partial(self._take_heads, device_mesh)
        module.register_forward_pre_hook(hook, with_kwargs=True)
        if not self.use_local_output:
            module.register_forward_hook(partial(self._give_heads, device_mesh))
        return module

    def _take_heads(
        self, mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(zip(("q", "k", "v"), args, strict=False)) | kwargs
        for name in ("q", "k", "v"):
            if isinstance(x := named.get(name), DTensor):
                named[name] = _local_heads(name, x, mesh)
        return (), named

    def _give_heads(self, mesh: DeviceMesh, module: nn.Module, args: Any, result: Any) -> Any:
        if isinstance(result, Tensor):
            return DTensor.from_local(result, mesh, (Shard(1),), run_check=False)
        out, aux = result
        lse = None if aux.lse is None else self._give_heads(mesh, module, args, aux.lse)
        return self._give_heads(mesh, module, args, out), AuxOutput(lse=lse)


def _local_heads(name: str, x: DTensor, mesh: DeviceMesh) -> Tensor:
    """Return this rank's heads of a tensor that is sharded by heads over a mesh."""
    if x.device_mesh != mesh or x.placements != (Shard(1),):
        raise ValueError(
            f"{name} must be sharded by heads, (Shard(dim=1),), on the mesh of the plan, got "
            f"{x.placements} on {x.device_mesh}: redistribute it"
        )
    if x.shape[1] % mesh.size():
        raise _unshared(name, "heads", mesh.size(), x.shape[1])
    return x.to_local()


def _unshared(name: str, what: str, size: int, number: int) -> ValueError:
    return ValueError(
        f"{name} must have a multiple of {size} {what}, the number of ranks, got {number}: use "
        "fewer ranks"
    )


def tensor_parallel_plan(
    prefix: str = "",
    *,
    q: str = "q_proj",
    k: str = "k_proj",
    v: str = "v_proj",
    out: str = "o_proj",
    attention: str | None = "attention",
) -> dict[str, ParallelStyle]:
    """Return the plan by which `parallelize_module` shards an attention layer by heads.

    It is for layers like those of Llama: three projections, whose outputs the layer views as
    `[..., heads, head_dim]` with as many heads as there are, a `MoBAAttention`, and a projection
    back. The number of ranks must divide both numbers of heads; otherwise the view fails.

    Args:
        prefix: Goes before every name, such as "layers.*.self_attn.".
        q: Name of the projection to queries.
        k: Name of the projection to keys.
        v: Name of the projection to values.
        out: Name of the projection of the output.
        attention: Name of the `MoBAAttention`; None if the layer calls a function.

    Returns:
        Styles by name, to be joined with those of other modules.

    Example:
        >>> sorted(tensor_parallel_plan("layers.*.self_attn."))[:2]
        ['layers.*.self_attn.attention', 'layers.*.self_attn.k_proj']
    """
    plan: dict[str, ParallelStyle] = {prefix + name: ColwiseParallel() for name in (q, k, v)}
    plan[prefix + out] = RowwiseParallel()
    return plan if attention is None else plan | {prefix + attention: HeadParallel()}
