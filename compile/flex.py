"""The only call of FlexAttention, and its compilation for eager callers."""

import functools
import inspect
import itertools
import threading
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import TracingContext
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention

from moba_flex.masks._torch.exporting import is_traced
from moba_flex.masks._torch.inputs import contiguous
from moba_flex.masks.layout import Layout
from moba_flex.masks.mods import MaskMod, Mods, ScoreMod
from moba_flex.masks.request import Gate, Request
from moba_flex.masks.routing import Routing

Attention = Callable[[Request], Any]
"""A function from a request to output and log-sum-exp."""

_serial = itertools.count()
_MOST_GRAPHS = 64
_HAS_LIMIT = "recompile_limit" in inspect.signature(torch.compile).parameters
_calls = threading.Lock()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    scale: float,
    *,
    lse: bool,
    score_mod: ScoreMod | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend under a BlockMask.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, Dv]`.
        mask: Which keys each query sees; None for all.
        scale: Factor on the scores.
        lse: Whether to return the log-sum-exp too, which FlexAttention on CPU cannot.
        score_mod: Changes scores, given indices into q and k as passed here.

    Returns:
        Output `[B, Hq, Q, Dv]`, and log-sum-exp `[B, Hq, Q]` in float32; empty unless `lse`.
    """
    if q.device.type == "cpu":
        q, k = _widened(q), _widened(k)
    # FlexAttention's offsets within a head are 32-bit: a transposed layout overflows them at 2**31
    # / (H * D) keys. And its C++ template assumes that each vector is contiguous.
    q, k, v = (contiguous(x) for x in (q, k, v))
    options = _kernel_options(q, v, score_mod is not None) if q.is_cuda else None
    result = flex_attention(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True) if lse else None,
        kernel_options=options,
    )
    if not lse:
        return cast(Tensor, result), q.new_empty(0)
    out, aux = cast(tuple[Tensor, AuxOutput], result)
    return out, cast(Tensor, aux.lse)


def _widened(x: Tensor) -> Tensor:
    """Return queries or keys `[B, H, length, D]` with zeros up to a head dim of 24.

    For smaller head dims FlexAttention's C++ template takes 16 keys at a time, even where 8 are
    left. With vectors of 8 numbers, as AVX2 has them, it then overwrites the memory behind the
    scores.
    """
    if x.shape[3] >= 24:
        return x
    # A dynamic head dim becomes constant here, as FlexAttention would make it: without that, its
    # template does not compile with the scale.
    head_dim = next(size for size in range(24) if x.shape[3] == size)
    return F.pad(x, (0, 24 - head_dim))


def _kernel_options(q: Tensor, v: Tensor, changed: bool) -> Any:
    """Return options for FlexAttention's kernels on CUDA.

    FlexAttention's own choice may exceed the 227 KiB of shared memory of a program on Hopper GPUs.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        v: Values, `[B, Hkv, KV, Dv]`.
        changed: Whether there is a score_mod.
    """
    # For fewer than 128 queries FlexAttention would choose its decoding kernel, which for some
    # dtypes and head dims has no tile that fits the mask blocks.
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    head_dim, value_dim = q.shape[3], v.shape[3]
    if head_dim != 256 and max(head_dim, value_dim) > 128:
        # FlexAttention chooses by D alone, and has tiles for 64, 128 and 256. These are the tiles
        # for 256.
        rows = 32 if q.dtype == torch.float32 else 64
        options |= {"fwd_BLOCK_M": rows, "fwd_BLOCK_N": 32, "fwd_num_stages": 3}
    if changed or value_dim > 128:
        # FlexAttention's three stages for D from 64 to 128, together with the gradients of
        # captured tensors, fill the memory to the last byte.
        options["bwd_num_stages"] = 2
    return options


class _Outline(NamedTuple):
    """The part of a request that a graph is compiled for: all but its tensors and functions.

    Attributes:
        gate: The gate's numbers, without `head_top_k`; None if a routing is given.
        block_size: Keys per block.
        causal: Whether a query sees only keys at its position and before.
        scale: Factor on the scores.
        softcap: Limit of the scores, if any.
        lse: Whether to return the log-sum-exp.
        given: Names of the tensors besides q, k and v.
        kind: Device, dtype, numbers of heads, head dims, and which tensors need gradients.
    """

    gate: tuple[int, int, int, int] | None
    block_size: int
    causal: bool
    scale: float
    softcap: float | None
    lse: bool
    given: tuple[str, ...]
    kind: tuple[Hashable, ...]

    @classmethod
    def of(cls, request: Request, layout: Layout, tensors: dict[str, Tensor]) -> "_Outline":
        """Return the outline of a request."""
        q, k, v, gate = request.q, request.k, request.v, request.gate
        numbers = None
        if gate is not None:
            numbers = gate.block_size, gate.top_k, gate.sink_blocks, gate.local_blocks
        grads = torch.is_grad_enabled(), q.requires_grad, k.requires_grad, v.requires_grad
        kind = q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3], v.shape[3], grads
        return cls(
            numbers,
            layout.block_size,
            layout.causal,
            request.scale,
            request.mods.softcap,
            request.lse,
            tuple(tensors),
            kind,
        )

    def request(
        self, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Tensor], mods: Mods
    ) -> Request:
        """Return a request of this outline; runs inside the graph."""
        layout = Layout(q.shape[2], k.shape[2], self.block_size, self.causal)
        layout = layout.with_tables(tensors.get("queries"), tensors.get("extents"))
        gate = routing = None
        if self.gate is not None:
            gate = Gate(*self.gate, self.causal, tensors.get("head_top_k"))
        else:
            routing = Routing.over(layout, tensors["blocks"])
        return Request(
            q, k, v, self.scale, gate=gate, routing=routing, layout=layout, mods=mods, lse=self.lse
        )


def in_one_graph(function: Attention) -> Attention:
    """Make a function that calls FlexAttention run compiled, also for eager callers.

    Uncompiled FlexAttention computes every score, masked or not. So for eager callers the function
    is compiled, to one graph per outline, which serves all lengths and batch sizes. In a caller's
    graph it becomes part of that graph.
    """

    @functools.wraps(function)
    def call(request: Request) -> Any:
        if is_traced():
            return function(request)
        request = request.located()
        layout, gate, routing = request.layout, request.gate, request.routing
        assert layout is not None
        tensors = {
            "head_top_k": None if gate is None else gate.head_top_k,
            "blocks": None if routing is None else routing.blocks,
            "queries": layout.queries,
            "extents": layout.extents,
        }
        given = {name: x for name, x in tensors.items() if x is not None}
        # With ten symbolic sizes or more, FlexAttention's C++ template does not compile: it
        # mistakes the tenth symbol for the first one followed by a digit.
        static = request.q.device.type == "cpu" and not (request.is_plain and request.mods.none)
        graph = _compiled(function, _Outline.of(request, layout, given), static)
        return graph(request, given)

    return call


@functools.cache
def _compiled(
    function: Attention, outline: _Outline, static: bool
) -> Callable[[Request, dict[str, Tensor]], Any]:
    """Return `function` for requests of an outline, compiled to one graph.

    Args:
        function: What to compile.
        outline: The outline. Requests whose mods differ only in captured tensors share a graph.
        static: Whether to compile anew for each combination of sizes.
    """

    # No *args: PyTorch names the symbols of dynamic shapes after the parameters, and the names
    # that *args gives do not compile in FlexAttention's C++ template.
    def bound(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensors: dict[str, Tensor],
        score_mod: ScoreMod | None,
        mask_mod: MaskMod | None,
    ) -> Any:
        # Instead of `fullgraph=True`: with it, calls from several threads fail at random in
        # PyTorch 2.13, which counts graphs in a global (pytorch/pytorch#185138).
        with torch._dynamo.error_on_graph_break(True):
            mods = Mods(score_mod, mask_mod, outline.softcap)
            return function(outline.request(q, k, v, tensors, mods))

    # PyTorch counts recompilations per code object, and records by its name which sizes vary. So
    # each outline gets a code object and a name: only lengths and batch sizes vary within one.
    code = bound.__code__.replace(co_name=f"{function.__name__}_{next(_serial)}")
    own = types.FunctionType(code, globals(), closure=bound.__closure__)
    # Lengths of less than a tile or of fewer than `top_k` blocks need graphs of their own: more
    # than PyTorch's default limit of 8.
    limit: dict[str, Any] = {"recompile_limit": _MOST_GRAPHS} if _HAS_LIMIT else {}
    graph = torch.compile(
        own,
        dynamic=False if static else None,
        backend=repeatable,
        # PyTorch 2.11 pads strides, then reads some tensors with the unpadded ones
        # (pytorch/pytorch#194281).
        options={"comprehensive_padding": False},
        **limit,
    )

    def call(request: Request, tensors: dict[str, Tensor]) -> Any:
        # Contiguous inputs let all memory layouts share a graph.
        inputs = [x.contiguous() for x in (request.q, request.k, request.v)]
        mods = request.mods
        # Without the argument `recompile_limit` a setting of the process is changed: one call at a
        # time.
        limited = nullcontext() if _HAS_LIMIT else _limited()
        try:
            with limited:
                return graph(*inputs, tensors, mods.score_mod, mods.mask_mod)
        except torch._dynamo.exc.Unsupported:
            mods.check_results(request.q)  # raises an error that names the fault, if mods have one
            raise

    return call


@contextmanager
def _limited() -> Iterator[None]:
    from torch._dynamo import config

    with _calls, config.patch(recompile_limit=_MOST_GRAPHS):
        yield


def repeatable(
    graph: torch.fx.GraphModule, example: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile like inductor, but let callers run backward twice; a backend of `torch.compile`.

    Inductor's backward overwrites ("donates") saved tensors, and raises under `retain_graph=True`.
    PyTorch's setting that turns donation off does not help up to 2.13: such a backward mistakes
    "did not look for donated tensors" for "found some". So this backend reports that there are
    none.
    """
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(
        graph, example, inner_compile=_donating_nothing, config_patches=options
    )
    return compiled  # a function, since no output is packed


def _donating_nothing(*args: Any, **options: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx_inner

    context = TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        context.fw_metadata.bw_donated_idxs = []
    return compile_fx_inner(*args, **options)
