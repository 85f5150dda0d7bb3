"""Checks of what callers pass, made once at the public doors."""

from torch import Tensor


def check_int(name: str, value: object, least: int) -> None:
    """Raise unless `value` is an int, `least` or more.

    Raises:
        TypeError: It is no int.
        ValueError: It is less.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_gate(block_size: int, top_k: int, sink_blocks: int, local_blocks: int) -> None:
    """Raise unless these are options of a gate.

    Raises:
        TypeError: One is no int.
        ValueError: One is out of range, or `top_k` cannot hold the forced blocks.
    """
    check_int("block_size", block_size, 1)
    check_int("top_k", top_k, 1)
    check_int("sink_blocks", sink_blocks, 0)
    check_int("local_blocks", local_blocks, 0)
    need = 1 + sink_blocks + local_blocks
    if need > top_k:
        raise ValueError(
            f"top_k must be at least 1 + sink_blocks + local_blocks = {need}, got {top_k}: "
            "the own and the forced blocks count in top_k"
        )


def check_qk(q: Tensor, k: Tensor) -> None:
    """Raise unless `q` `[B, Hq, Q, D]` and `k` `[B, Hkv, KV, D]` fit each other.

    Raises:
        TypeError: One is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes or devices do not fit.
    """
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [B, H, length, D], got shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {x.dtype}")
        if 0 in x.shape:
            raise ValueError(f"{name} must have no empty dimension, got shape {tuple(x.shape)}")
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
    """Raise unless `q`, `k` and `v` fit each other; `v` is `[B, Hkv, KV, D]` like `k`.

    Raises:
        TypeError: One is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes or devices do not fit.
    """
    check_qk(q, k)
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a Tensor, got {type(v).__name__}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    _check_match("v", "q", v, q)


def _check_match(name: str, other: str, x: Tensor, y: Tensor) -> None:
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{name} must have the batch size of {other}, {y.shape[0]}, got {x.shape[0]}"
        )
    if x.dtype != y.dtype:
        raise TypeError(f"{name} must have the dtype of {other}, {y.dtype}, got {x.dtype}")
    if x.device != y.device:
        raise ValueError(f"{name} must be on the device of {other}, {y.device}, got {x.device}")
