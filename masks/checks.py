"""Checks of arguments, made once by the public functions.

They also run while a graph is traced. Lengths may be symbols there, and every condition on them
that is checked becomes a guard of the graph. The contents of tensors are checked in eager code
alone.
"""

import inspect
import itertools
import math
import numbers
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import AuxRequest

from moba_flex.masks._torch.exporting import is_traced
from moba_flex.masks.layout import Layout, RowOptions
from moba_flex.masks.mods import Mods
from moba_flex.masks.routing import Routing

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Under torch.export, numbers computed from lengths are symbols.
_SYMBOLS = torch.SymInt, torch.SymFloat
_MOST = 2**63 - 1  # the largest int that an op takes


def check_int(name: str, value: Any, least: int) -> int:
    """Return `value`, an int of Python or NumPy, as an int; raise unless it is at least `least`.

    Raises:
        TypeError: It is no int.
        ValueError: It is less than `least`, or does not fit into 64 bits.
    """
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        value = operator.index(value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > _MOST:
        raise ValueError(f"{name} must be at most 2**63 - 1, got {value}")
    checked: int = value
    return checked


def check_bool(name: str, value: Any) -> bool:
    """Return `value`, a bool of Python or NumPy, as a bool.

    Raises:
        TypeError: It is no bool.
    """
    if value is True or value is False:
        return bool(value)
    if type(value).__module__ == "numpy" and value.dtype.kind == "b" and value.ndim == 0:
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_aux(return_aux: Any) -> bool:
    """Return whether `return_aux` asks for the log-sum-exp.

    Raises:
        TypeError: `return_aux` is neither None nor an AuxRequest.
        ValueError: It asks for `max_scores`.
    """
    if return_aux is None:
        return False
    if not isinstance(return_aux, AuxRequest):
        raise TypeError(
            f"return_aux must be an AuxRequest, got {type(return_aux).__name__}: "
            "pass torch.nn.attention.flex_attention.AuxRequest(lse=True)"
        )
    if return_aux.max_scores:
        raise ValueError("return_aux must ask for lse alone, got max_scores=True")
    return return_aux.lse


def check_qk(q: Tensor, k: Tensor) -> None:
    """Raise unless `q` `[B, Hq, Q, D]` and `k` `[B, Hkv, KV, D]` fit each other.

    Raises:
        TypeError: An argument is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes or devices do not fit.
    """
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        _check_kind(name, x)
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [B, H, length, D], got shape {tuple(x.shape)}"
            )
        if 0 in (x.shape[1], x.shape[3]):
            raise ValueError(
                f"{name} must have heads and a head_dim of at least 1, got shape {tuple(x.shape)}"
            )
    _check_match("k", "q", k, q)
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have the head_dim of q, {q.shape[3]}, got {k.shape[3]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must have a multiple of {k.shape[1]} heads, the heads of k, got {q.shape[1]}"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"q must have at most as many positions as k, {k.shape[2]}, got {q.shape[2]}: "
            "queries are the last positions of the keys"
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless `q`, `k` and `v` fit each other; `v` is `[B, Hkv, KV, Dv]`.

    Raises:
        TypeError: An argument is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes or devices do not fit.
    """
    check_qk(q, k)
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a Tensor, got {type(v).__name__}")
    _check_kind("v", v)
    if v.dim() != 4 or v.shape[:3] != k.shape[:3] or v.shape[3] == 0:
        raise ValueError(
            f"v must have the shape of k, {tuple(k.shape)}, save its head_dim, got "
            f"{tuple(v.shape)}"
        )
    _check_match("v", "q", v, q)


def _check_kind(name: str, x: Tensor) -> None:
    """Raise unless `x` is a dense local tensor of a dtype that attention is computed in.

    Raises:
        TypeError: `x` is another kind of tensor, or has another dtype.
    """
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(
            f"{name} must be a dense tensor, got {kind}: lay documents one after another and pass "
            "cu_seqlens"
        )
    if x.dtype not in _DTYPES:
        if not x.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {x.dtype}")
        raise TypeError(f"{name} must have at least 16 bits, got {x.dtype}: convert q, k and v")
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{name} must be a local tensor, got a DTensor: heads are independent of each other, "
            "so shard them and pass x.to_local()"
        )


def check_transforms(*tensors: Tensor) -> None:
    """Raise under `torch.func.vmap`, `torch.jit.trace`, and where tensors carry tangents.

    `torch.jit.trace` would record a graph for the lengths of the example alone. And for an op
    without a formula for tangents PyTorch raises no error, but returns tangents of zero.

    Raises:
        ValueError: A tensor is a batch of tensors or has a tangent, or the call is traced.
    """
    if torch.compiler.is_dynamo_compiling():  # Dynamo cannot trace the checks below
        _refuse_tangents(len(_levels_of_jvp()) > 0)
        return
    if torch._C._get_tracing_state() is not None:
        raise ValueError(
            "moba_attention must be traced by torch.export, got torch.jit.trace: "
            "use moba_flex.compile.export"
        )
    for x in tensors:
        while isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x):
            if torch._C._functorch.is_batchedtensor(x):
                raise ValueError(
                    "q, k and v must be plain tensors, got some under torch.func.vmap: "
                    "make what vmap runs over part of the batch"
                )
            _refuse_tangents(torch._C._functorch.maybe_get_level(x) in _levels_of_jvp())
            x = torch._C._functorch.get_unwrapped(x)
        _refuse_tangents(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _levels_of_jvp() -> list[int]:
    """Return the levels of the running or traced transforms that are `torch.func.jvp`."""
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    jvp = torch._C._functorch.TransformType.Jvp
    return [x.level() for x in transforms if x.key() == jvp]


def _refuse_tangents(exist: bool) -> None:
    if exist:
        raise ValueError(
            "q, k and v must have no tangents, got some from forward-mode AD: "
            "use torch.func.vjp or backward"
        )


def check_whole_sequence() -> None:
    """Raise within PyTorch's `context_parallel`, where each process has a part of the sequence.

    It replaces `scaled_dot_product_attention` alone. Another attention would take the part for the
    whole.

    Raises:
        ValueError: `scaled_dot_product_attention` is replaced.
    """
    if _is_context_parallel():
        raise ValueError(
            "moba_attention must be called outside of torch's context_parallel, got a call within "
            "it: use moba_flex.distributed.context_parallel_attention"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_context_parallel() -> bool:
    home: str = getattr(F.scaled_dot_product_attention, "__module__", None) or ""
    return home.startswith("torch.distributed.")


def check_blocks(name: str, routing: Any) -> None:
    """Raise unless `routing` is one whose parts fit each other.

    Raises:
        TypeError: It is no routing, or its blocks are no integers.
        ValueError: Its sizes do not fit.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"{name} must be a Routing, got {type(routing).__name__}")
    blocks = routing.blocks
    if not isinstance(blocks, Tensor):
        raise TypeError(f"{name}.blocks must be a Tensor, got {type(blocks).__name__}")
    if blocks.dtype == torch.bool or blocks.is_floating_point() or blocks.is_complex():
        raise TypeError(f"{name}.blocks must have an integer dtype, got {blocks.dtype}")
    if blocks.dim() != 4:
        raise ValueError(
            f"{name}.blocks must have 4 dimensions [B, H, Q, K], got shape {tuple(blocks.shape)}"
        )
    check_int(f"{name}.block_size", routing.block_size, 1)
    check_bool(f"{name}.causal", routing.causal)
    if routing.q_len != blocks.shape[2]:
        raise ValueError(
            f"{name}.q_len must be that of its blocks, {blocks.shape[2]}, got {routing.q_len}"
        )


def check_routing(routing: Routing, q: Tensor, k: Tensor) -> None:
    """Raise unless a routing fits `q` and `k`.

    Raises:
        TypeError: It is no routing, or its blocks are no integers.
        ValueError: Its sizes or its device do not fit.
    """
    check_blocks("routing", routing)
    blocks = routing.blocks
    batch, heads, q_len = blocks.shape[:3]
    shape = batch, q.shape[1] if heads == k.shape[1] else heads, q_len, routing.kv_len
    if shape != (*q.shape[:3], k.shape[2]):
        raise ValueError(
            f"routing must be of [B, Hq, Q, KV] = {(*q.shape[:3], k.shape[2])}, got one of "
            f"{(batch, heads, q_len, routing.kv_len)}"
        )
    if blocks.device != q.device:
        raise ValueError(f"routing must be on the device of q, {q.device}, got {blocks.device}")
    check_tables("routing.tables", routing.tables, q, k, routing)


def check_tables(name: str, tables: Layout | None, q: Tensor, k: Tensor, options: Any) -> None:
    """Raise unless `tables` is None, or a layout that fits `q`, `k` and these options.

    Args:
        name: The name of the argument, for messages.
        tables: The layout.
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        options: A gate or a routing, with a `block_size` and `causal`.

    Raises:
        TypeError: `tables` is no layout.
        ValueError: Its sizes or its device do not fit, or it was made with other options.
    """
    if tables is None:
        return
    if not isinstance(tables, Layout):
        raise TypeError(f"{name} must be a Layout, got {type(tables).__name__}: see make_tables")
    made = {
        "block_size": (tables.block_size, options.block_size),
        "causal": (tables.causal, options.causal),
        "kv_len": (tables.kv_len, k.shape[2]),
        "q_len": (tables.q_len, q.shape[2]),
    }
    for option, (got, want) in made.items():
        if got != want:
            raise ValueError(f"{name} must be made with {option}={want}, got {option}={got}")
    if tables.queries is None or tables.extents is None:
        return
    rows = tables.queries.shape[1], tables.extents.shape[1]
    if rows not in ((1, 1), (q.shape[0], q.shape[0])):
        raise ValueError(f"{name} must be of 1 or {q.shape[0]} rows, got {rows}")
    for x in (tables.queries, tables.extents):
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def longest_sequence(kv_len: int, rows: RowOptions) -> int:
    """Return the number of keys of the longest document or row; `kv_len` if it cannot be read."""
    if is_traced():
        return kv_len
    cu_seqlens, key_mask = rows.get("cu_seqlens"), rows.get("key_mask")
    if cu_seqlens is not None:
        return max(_values(cu_seqlens.diff()), default=kv_len)
    if key_mask is not None:
        return max(_values(key_mask.sum(1)), default=kv_len)
    return kv_len


def check_head_top_k(head_top_k: Tensor | None, q: Tensor, least: int, most: int) -> None:
    """Raise unless `head_top_k` is None, or a number of blocks for each head of `q`.

    Args:
        head_top_k: The numbers, int `[Hq]` or `[B, Hq]`.
        q: Queries, `[B, Hq, Q, D]`.
        least: `1 + sink_blocks + local_blocks`.
        most: `top_k`.

    Raises:
        TypeError: It is no tensor of integers.
        ValueError: Its shape or device does not fit, or a number is out of range.
    """
    if head_top_k is None:
        return
    _check_integers("head_top_k", head_top_k, q)
    if head_top_k.shape not in (q.shape[1:2], q.shape[:2]):
        raise ValueError(
            f"head_top_k must have shape [Hq] = ({q.shape[1]},) or [B, Hq], got "
            f"{tuple(head_top_k.shape)}"
        )
    for number in _values(head_top_k.flatten()):
        if not least <= number <= most:
            raise ValueError(
                "head_top_k must be from 1 + sink_blocks + local_blocks to top_k, "
                f"{least} to {most}, got {number}"
            )


def check_layout(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> None:
    """Raise unless these describe packed documents or padding of `q` and `k`.

    Raises:
        TypeError: An argument is no tensor, or has another dtype.
        ValueError: Shapes, devices or contents do not fit.
    """
    if cu_seqlens is not None:
        if key_mask is not None:
            raise ValueError(
                "key_mask must be None beside cu_seqlens, got both: "
                "leave padding out of packed documents"
            )
        _check_documents(q, k, cu_seqlens, cu_seqlens_q)
    elif cu_seqlens_q is not None:
        raise ValueError("cu_seqlens must be given with cu_seqlens_q, got None")
    if key_mask is not None:
        _check_key_mask(q, k, key_mask)


def _check_documents(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_q: Tensor | None
) -> None:
    q_len, kv_len = q.shape[2], k.shape[2]
    if cu_seqlens_q is None and q_len != kv_len:
        raise ValueError(
            f"cu_seqlens_q must say where documents start among {q_len} queries of {kv_len} keys, "
            "got None"
        )
    starts = _check_cu_seqlens("cu_seqlens", cu_seqlens, q, kv_len, "keys")
    if cu_seqlens_q is None:
        return
    q_starts = _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, q_len, "queries")
    if cu_seqlens_q.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_q must have as many entries as cu_seqlens, {cu_seqlens.shape[0]}, got "
            f"{cu_seqlens_q.shape[0]}"
        )
    for i in range(min(len(starts), len(q_starts)) - 1):
        queries, keys = q_starts[i + 1] - q_starts[i], starts[i + 1] - starts[i]
        if queries > keys:
            raise ValueError(
                f"cu_seqlens_q must give document {i} at most as many queries as keys, {keys}, "
                f"got {queries}: queries are the last positions of the keys"
            )


def _check_cu_seqlens(name: str, x: Tensor, q: Tensor, length: int, of: str) -> list[int]:
    """Raise unless `x` rises from 0 to at most `length`; return its numbers, if readable."""
    _check_integers(name, x, q)
    if x.dim() != 1 or x.shape[0] < 2:
        raise ValueError(f"{name} must have shape [documents + 1], got {tuple(x.shape)}")
    starts = _values(x)
    if not starts:
        return starts
    if starts[0] != 0:
        raise ValueError(f"{name} must start at 0, got {starts[0]}")
    for before, after in itertools.pairwise(starts):
        if after < before:
            raise ValueError(f"{name} must not decrease, got {after} after {before}")
    if starts[-1] > length:
        raise ValueError(
            f"{name} must end at the number of {of}, {length}, or before, got {starts[-1]}"
        )
    return starts


def _check_key_mask(q: Tensor, k: Tensor, key_mask: Tensor) -> None:
    _check_tensor("key_mask", key_mask, q)
    if key_mask.dtype != torch.bool:
        raise TypeError(
            f"key_mask must have dtype torch.bool, got {key_mask.dtype}: use key_mask.bool()"
        )
    shape = k.shape[0], k.shape[2]
    if key_mask.shape != shape:
        raise ValueError(
            f"key_mask must have shape [B, KV] = {tuple(shape)}, got {tuple(key_mask.shape)}"
        )
    if not is_readable(key_mask):
        return
    rises = key_mask[:, :1].int().sum(1) + (key_mask[:, 1:] & ~key_mask[:, :-1]).sum(1)
    for row, runs in enumerate(_values(rises)):
        if runs > 1:
            raise ValueError(
                f"key_mask must have one run of True a row, got {runs} in row {row}: "
                "pad on the left, on the right or on both sides"
            )


def check_scale(scale: Any) -> float | None:
    """Return `scale` as a number that ops take; None if it is None.

    Raises:
        TypeError: It is no number.
        ValueError: It is not finite, or a tensor that cannot be read or requires a gradient.
    """
    if scale is None:
        return None
    number: float = _number("scale", scale)
    if not -math.inf < number < math.inf:  # `math.isfinite` would break a graph
        raise ValueError(f"scale must be finite, got {number}")
    return number


def _number(name: str, value: Any) -> Any:
    """Convert a number of Python or NumPy, or in a tensor without dimensions, to Python's."""
    if isinstance(value, (int, float, *_SYMBOLS)) and not isinstance(value, bool):
        return value
    if isinstance(value, Tensor) and value.dim() == 0 and value.dtype != torch.bool:
        if value.requires_grad:
            raise ValueError(
                f"{name} must be a number without a gradient, got a Tensor that requires one: "
                "multiply q by it"
            )
        if not is_readable(value):
            raise ValueError(f"{name} must be a number, got a Tensor that cannot be read here")
        value = value.item()
    if isinstance(value, (bool, complex)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_softcap(softcap: Any) -> float | None:
    """Return `softcap` as a number that ops take; None if it is None.

    Raises:
        TypeError: It is no number.
        ValueError: It is not positive and finite, or a tensor that cannot be read or requires a
            gradient.
    """
    if softcap is None:
        return None
    number: float = _number("softcap", softcap)
    if not 0 < number < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {number}: use None")
    return number


def check_mods(mods: Mods) -> None:
    """Raise unless `score_mod` and `mask_mod` are functions that FlexAttention can call.

    Raises:
        TypeError: One is no function, or takes another number of arguments.
    """
    _check_function("score_mod", mods.score_mod, ("score", "b", "h", "q_idx", "kv_idx"))
    _check_function("mask_mod", mods.mask_mod, ("b", "h", "q_idx", "kv_idx"))


def _check_function(name: str, function: Any, parameters: tuple[str, ...]) -> None:
    if function is None:
        return
    if not callable(function):
        raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    if torch.compiler.is_dynamo_compiling():  # Dynamo cannot trace `inspect.signature`
        return
    try:
        signature = inspect.signature(function)
    except ValueError:  # built-in functions have no signature
        return
    try:
        signature.bind(*parameters)
    except TypeError:
        raise TypeError(
            f"{name} must take {len(parameters)} arguments ({', '.join(parameters)}), got "
            f"{name}{signature}"
        ) from None


def _check_tensor(name: str, x: Any, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def _check_integers(name: str, x: Any, q: Tensor) -> None:
    _check_tensor(name, x, q)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must have dtype torch.int32 or torch.int64, got {x.dtype}")


def _values(x: Tensor) -> list[int]:
    """Return the numbers in `x` `[n]`; an empty list if they cannot be read."""
    values: list[int] = x.tolist() if is_readable(x) else []
    return values


def is_readable(x: Tensor) -> bool:
    """Whether the contents of `x` exist and no graph is being traced or captured."""
    if is_traced() or isinstance(x, FakeTensor) or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def is_seen(x: Tensor) -> bool:
    """Whether the host may look at `x`: not if it would have to wait for a GPU."""
    return is_readable(x) and not x.is_cuda


def _check_match(name: str, other: str, x: Tensor, y: Tensor) -> None:
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{name} must have the batch size of {other}, {y.shape[0]}, got {x.shape[0]}"
        )
    if x.dtype != y.dtype:
        raise TypeError(f"{name} must have the dtype of {other}, {y.dtype}, got {x.dtype}")
    if x.device != y.device:
        raise ValueError(f"{name} must be on the device of {other}, {y.device}, got {x.device}")
