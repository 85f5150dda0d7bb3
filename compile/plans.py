"""The plans: several ways to compute the same function, and who may serve a request.

To add a plan, write a class with `refuses` and `__call__`, and name it in `PLANS`.
"""

import importlib.util
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from typing_extensions import override  # of typing from Python 3.12 on; PyTorch needs it too

from moba_flex.compile.cpu import attend_cpu, attend_portable, attend_with_functions, show_spoilt
from moba_flex.compile.decode import decode_cpu
from moba_flex.compile.flex import attend, in_one_graph
from moba_flex.compile.merge import gather_rows, merge_parts
from moba_flex.masks._torch.exporting import is_exporting, is_traced
from moba_flex.masks._torch.gradients import is_transformed
from moba_flex.masks._torch.inputs import finite
from moba_flex.masks.append import MOST_ROWS
from moba_flex.masks.block_mask import routing_to_block_mask
from moba_flex.masks.checks import longest_sequence
from moba_flex.masks.layout import LONGEST, Layout, ceil_div
from moba_flex.masks.pool import pool
from moba_flex.masks.regroup import regroup
from moba_flex.masks.request import Gate, Request
from moba_flex.masks.router import numbers_of, route_request
from moba_flex.masks.tiles import (
    TILE,
    lay_out_keys,
    own_block_mask,
    regrouped_origin,
    routed_block_mask,
)

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # it comes with PyTorch for CUDA
if _HAS_TRITON:
    import triton

    from moba_flex.compile.decode_kernels import (
        decode_few_triton,
        decode_step_triton,
        decode_triton,
    )
    from moba_flex.compile.fused import attend_fused, choose_and_attend_fused

Result = tuple[Tensor, Tensor | None]
"""Output `[B, Hq, Q, Dv]`, and log-sum-exp `[B, Hq, Q]` or, if not asked for, possibly None."""

PlanName = Literal["dense", "decode", "fused", "routed", "masked"]

# What FlexAttention and this library compile kernels for.
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FUSED_HEAD_DIM = 256

_FEW_QUERIES = 64
_MOST_BLOCKS = 2**20  # more would overflow counters of the kernel that chooses and attends


class Plan:
    """One way to compute attention."""

    name: PlanName
    reads_pages = False
    """Whether it serves a request whose keys lie in pages."""

    def refuses(self, request: Request) -> Exception | None:
        """Return why the plan cannot serve a request; None if it can."""
        raise NotImplementedError

    def suits(self, request: Request) -> bool:
        """Return whether "auto" takes the plan, if it can serve the request."""
        return True

    def appends(self, request: Request) -> bool:
        """Return whether the plan appends the new keys of a request before it attends."""
        return False

    def __call__(self, request: Request) -> Result:
        """Attend."""
        raise NotImplementedError


class Dense(Plan):
    """Attention to everything: a library call, or routed attention with one block a sequence."""

    name = "dense"

    @override
    def refuses(self, request: Request) -> Exception | None:
        gate, kv_len = request.gate, request.k.shape[2]
        if gate is None:
            return _no_such_plan(PLANS[1:], self.name)
        if gate.head_top_k is not None:
            return ValueError(
                "head_top_k must be None for plan='dense', got a Tensor: let plan be 'auto'"
            )
        if not gate.covers(kv_len):
            longest = longest_sequence(kv_len, request.rows or {})
            if not gate.covers(longest):
                return ValueError(
                    f"top_k must cover all {ceil_div(longest, gate.block_size)} blocks for "
                    f"plan='dense', got {gate.top_k}: raise top_k, or let plan be 'auto'"
                )
        if on_cpu(request.q) or _is_plain_sdpa(request):
            return None
        return _refused_by_flex(request, self.name)

    @override
    def suits(self, request: Request) -> bool:
        cached = request.slots is not None or request.block_keys is not None
        if cached and request.q.is_cuda:  # SDPA knows no slots, and FlexAttention compiles anew
            return False
        return request.gate is not None and request.gate.covers(request.k.shape[2])

    @override
    def __call__(self, request: Request) -> Result:
        if _is_plain_sdpa(request):
            (q, scale), k, v = _scaled_up(request), request.k, request.v
            gqa = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=request.causal, scale=scale, enable_gqa=gqa
            )
            return out, None
        if not (on_cpu(request.q) or request.causal) and request.is_plain and request.mods.none:
            return _attend_to_all(request)
        # The one block of a sequence is its queries' own, and no other is left to choose.
        return _attend_routed(request.with_gate(Gate(LONGEST, 1, causal=request.causal)))


class Decode(Plan):
    """Few queries, each with its own choice among many keys, without gradients."""

    name = "decode"
    reads_pages = True

    @override
    def refuses(self, request: Request) -> Exception | None:
        inputs = request.q, request.k, request.v
        for name in ("score_mod", "mask_mod"):
            if getattr(request.mods, name) is not None:
                return ValueError(
                    f"{name} must be None for plan='decode', got a function: let plan be 'routed'"
                )
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return ValueError(
                "q, k and v must need no gradients for plan='decode', got some that do: "
                "let plan be 'auto', or use torch.no_grad()"
            )
        device = request.q.device.type
        if is_exporting() or device not in ("cpu", "cuda"):
            return ValueError(
                "q must be on cpu or cuda, and not in a package, for plan='decode', got "
                f"{device}: let plan be 'auto'"
            )
        return _refused_dtype(request) if device == "cuda" else None

    @override
    def suits(self, request: Request) -> bool:
        if is_exporting():  # the package would serve such lengths alone
            return False
        if request.q.is_cuda:
            return 0 < _rows(request) <= MOST_ROWS
        return 0 < request.q.shape[2] <= _FEW_QUERIES

    @override
    def appends(self, request: Request) -> bool:
        if request.new is None or request.q.shape[2] != request.new.keys.shape[2]:
            return False
        # In a graph the kernel does not assert that pages are in range.
        good = request.pages is None or not is_traced()
        return good and request.q.is_cuda and _chooses_in_kernel(request)

    @override
    def __call__(self, request: Request) -> Result:
        softcap = float(request.mods.softcap or 0.0)
        if request.q.is_cuda and _chooses_in_kernel(request):
            return _decode_few(request, softcap)
        request = request.joined()
        routing, (q, scale) = route_request(request), _scaled_up(request)
        given = q, request.k, request.v, *routing.parts, scale, softcap
        if q.is_cuda:
            return decode_triton(*given)
        out, lse = decode_cpu(*given, request.lse)
        return out, lse if request.lse else None


class Fused(Plan):
    """Triton kernels that gather the queries of each block inside the load."""

    name = "fused"

    @override
    def refuses(self, request: Request) -> Exception | None:
        if not request.q.is_cuda and not interpreted():
            return ValueError(
                f"q must be on cuda for plan='fused', got {request.q.device.type}: "
                "let plan be 'auto'"
            )
        for name, x in (("q", request.q), ("v", request.v)):
            if x.shape[3] > FUSED_HEAD_DIM:
                return ValueError(
                    f"{name} must have a head_dim of at most {FUSED_HEAD_DIM} for plan='fused', "
                    f"got {x.shape[3]}: let plan be 'routed'"
                )
        for name in ("score_mod", "mask_mod"):
            if getattr(request.mods, name) is not None:
                return ValueError(
                    f"{name} must be None for plan='fused', got a function: let plan be 'routed'"
                )
        return _refused_dtype(request)

    @override
    def suits(self, request: Request) -> bool:
        return request.q.is_cuda  # and not where the kernels are interpreted

    @override
    def __call__(self, request: Request) -> Result:
        q, k, v, gate = request.q, request.k, request.v, request.gate
        softcap = float(request.mods.softcap or 0.0)
        # The gate must see queries as they are: see `_scaled_up`.
        if gate is not None and gate.top_k > 1 and request.scale > 0:
            layout = request.find_layout()
            place = layout.queries, layout.extents, numbers_of(gate, layout), gate.causal
            given = request.block_keys, gate.head_top_k, *place, request.scale, softcap
            out, lse, *_ = choose_and_attend_fused(q, k, v, *given)
            return out, lse
        # One list for a whole group stays one list.
        routing, (q, scale) = request.routing or route_request(request), _scaled_up(request)
        out, lse, *_ = attend_fused(q, k, v, *routing.parts, scale, softcap)
        return out, lse


class Routed(Plan):
    """Queries regrouped by block: by FlexAttention on CUDA, by flash attention on CPU."""

    name = "routed"

    @override
    def refuses(self, request: Request) -> Exception | None:
        return None if on_cpu(request.q) else _refused_by_flex(request, self.name)

    @override
    def __call__(self, request: Request) -> Result:
        return _attend_routed(request)


class Masked(Plan):
    """FlexAttention in natural order, which skips the tiles that no query chose."""

    name = "masked"

    @override
    def refuses(self, request: Request) -> Exception | None:
        return _refused_by_flex(request, self.name) or self._refused_on_cpu(request)

    def _refused_on_cpu(self, request: Request) -> Exception | None:
        if request.q.is_cuda:
            return None
        if request.lse:
            return ValueError(
                "plan must be 'routed' or 'dense' to return lse on cpu, got 'masked'"
            )
        inputs = request.q, request.k, request.v
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return ValueError(
                "plan must be 'routed' or 'dense' for gradients on cpu, got 'masked': "
                "FlexAttention has no backward there; for inference use torch.no_grad()"
            )
        return None

    @override
    def suits(self, request: Request) -> bool:
        return False

    @override
    def __call__(self, request: Request) -> Result:
        return _attend_masked(request.without_unused())


PLANS: tuple[Plan, ...] = (Dense(), Decode(), Fused(), Routed(), Masked())
"""All plans, in the order in which "auto" asks them."""


def find_plan(name: str, request: Request) -> Plan:
    """Return the plan of a name, or the one that "auto" takes.

    Raises:
        ValueError: There is no such plan, or it cannot serve the request.
        TypeError: The plan computes in other dtypes.
    """
    if name == "auto":
        plans = [x for x in PLANS if x.suits(request)]
    else:
        plans = [x for x in PLANS if x.name == name]
        if not plans:
            raise _no_such_plan(PLANS if request.routing is None else PLANS[1:], name)
    for plan in plans:
        refusal = plan.refuses(request)
        if refusal is None:
            break
    refusal = refusal or _refused_by_export(request)
    if refusal is not None:
        raise refusal
    return plan


def _no_such_plan(plans: tuple[Plan, ...], name: str) -> ValueError:
    return ValueError(f"plan must be one of {('auto', *(x.name for x in plans))}, got {name!r}")


def _rows(request: Request) -> int:
    """Return how many queries share each key/value head of a row of the batch."""
    return request.q.shape[1] // request.k.shape[1] * request.q.shape[2]


def _chooses_in_kernel(request: Request) -> bool:
    """Whether one op can choose and attend, which reads on the device where keys lie."""
    if request.gate is None or (request.slots is None and not request.is_plain):
        return False
    gate, kv_len = request.gate, request.k.shape[2]
    small = _rows(request) <= MOST_ROWS and kv_len <= _MOST_BLOCKS * gate.block_size
    # The gate must see queries as they are: see `_scaled_up`.
    return small and request.scale > 0


def _decode_few(request: Request, softcap: float) -> Result:
    """Append new keys if there are some, choose and attend, in one op."""
    gate, slots, k, v = request.gate, request.slots, request.k, request.v
    assert gate is not None
    numbers = numbers_of(gate, Layout(request.q.shape[2], k.shape[2], gate.block_size, True))
    block_keys, table, counters, new = request.block_keys, None, request.counters, request.new
    if request.pages is not None:
        k, v, block_keys, table = request.pages
    elif block_keys is None:
        block_keys = pool(k, request.find_layout())
    query, start, stop = (None, None, None) if slots is None else slots
    scores = request.scale, softcap
    if new is None:
        places = query, start, stop, table, counters
        gating = numbers, gate.causal, gate.head_top_k
        return decode_few_triton(request.q, k, v, block_keys, *places, *gating, *scores)
    assert start is not None
    assert stop is not None
    assert counters is not None
    assert block_keys is not None
    cache, rows = (k, v, new.sums, block_keys), (start, stop, counters)
    given = new.keys, new.values, *cache, *rows, new.counts, table
    return decode_step_triton(request.q, *given, numbers, gate.head_top_k, *scores)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, which takes tensors on CPU."""
    return _HAS_TRITON and bool(triton.knobs.runtime.interpret)


def on_cpu(q: Tensor) -> bool:
    """Whether the engines for CPU serve; on meta they return the shapes."""
    return q.device.type in ("cpu", "meta")


def _is_plain_sdpa(request: Request) -> bool:
    """Whether `scaled_dot_product_attention` computes what dense attention is.

    It returns no log-sum-exp, and its causal mask starts at the first key, not at the last. On CPU
    it lets a later key that is not finite spoil earlier queries, and hides NaN among few keys.
    """
    if request.lse or not (request.is_plain and request.mods.none):
        return False
    if on_cpu(request.q) and (request.causal or not is_exporting()):
        return False
    return not request.causal or request.q.shape[2] == request.k.shape[2]


def _scaled_up(request: Request) -> tuple[Tensor, float]:
    """Return queries and a positive scale that give the same scores; the gate sees the others.

    Kernels scale what they have masked already: a negative scale would turn -inf into inf.
    """
    q, scale = request.q, request.scale
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


def _refused_dtype(request: Request) -> Exception | None:
    q = request.q
    if q.dtype in _KERNEL_DTYPES:
        return None
    names = " or ".join(map(str, _KERNEL_DTYPES))
    return TypeError(f"q must be {names} on {q.device.type}, got {q.dtype}: convert q, k and v")


def _refused_by_flex(request: Request, plan: str) -> Exception | None:
    """Return why FlexAttention cannot serve a request; None if it can."""
    q, v, device = request.q, request.v, request.q.device.type
    if device not in ("cpu", "cuda"):
        return ValueError(f"q must be on cpu or cuda for plan={plan!r}, got {device}")
    if is_transformed():
        return ValueError(
            f"plan must be one without FlexAttention under torch.func, got {plan!r} on {device}: "
            "let plan be 'auto', or use backward"
        )
    if device == "cuda":
        for name, x in (("q", q), ("v", v)):
            if x.shape[3] < 16:
                return ValueError(
                    f"{name} must have a head_dim of at least 16 on cuda, got {x.shape[3]}: pad it"
                )
        largest = max(x.numel() for x in (q, request.k, v))
        if largest >= 2**31:  # such a call ended in an illegal memory access
            return ValueError(
                f"q, k and v must have fewer than 2**31 elements each on cuda, got {largest}: "
                "split the batch or the heads"
            )
    return _refused_dtype(request)


def _refused_by_export(request: Request) -> Exception | None:
    """Return why a package cannot hold a request that is being exported; None if it can."""
    if not is_exporting():
        return None
    refusal = _refused_dtype(request)  # PyTorch 2.11 miscompiles the gate of float64 inputs
    if refusal is not None or request.q.device.type != "cpu":
        return refusal
    unmet = {
        "head_top_k": request.gate is not None and request.gate.head_top_k is not None,
        "cu_seqlens and key_mask": not request.is_plain,
        "routing": request.routing is not None,
        "softcap, score_mod and mask_mod": not request.mods.none,
    }
    for name, given in unmet.items():
        if given:
            return ValueError(
                f"{name} must be None in a package for cpu, got some: export for cuda"
            )
    return None


def _attend_routed(request: Request) -> Result:
    """Attend to the own blocks and to the chosen ones, part by part, and merge."""
    if not on_cpu(request.q):
        return _attend_regrouped(request.without_unused())
    routing, (q, scale), k, v = route_request(request), _scaled_up(request), request.k, request.v
    if is_exporting():  # rows are plain: see `_refused_by_export`
        return attend_portable(q, k, v, routing, scale=scale)
    softcap = float(request.mods.softcap or 0.0)
    # Without real tensors there are no scores for functions to change.
    if request.mods.ask and not (q.is_meta or isinstance(q, FakeTensor)):
        return attend_with_functions(q, k, v, routing, request.mods, scale)
    out, lse = attend_cpu(q, k, v, *routing.parts, scale, softcap)
    return out, lse


@in_one_graph
def _attend_to_all(request: Request) -> Result:
    q, scale = _scaled_up(request)
    return attend(q, request.k, request.v, None, scale, lse=True)


@in_one_graph
def _attend_regrouped(request: Request) -> Result:
    """Route; attend to own blocks in natural order, to chosen ones in regrouped order; merge."""
    routing, (q, scale) = route_request(request), _scaled_up(request)
    k, v, mods = request.k, request.v, request.mods
    own_mask = own_block_mask(routing, mods.on_masks())
    own_out, own_lse = attend(q, k, v, own_mask, scale, lse=True, score_mod=mods.on_scores())
    if routing.blocks.shape[3] == 0:
        return own_out, own_lse

    batch, num_kv_heads = k.shape[:2]
    rows = q.reshape(batch, num_kv_heads, -1, q.shape[3])
    layout, routing = lay_out_keys(routing)
    groups = regroup(routing, num_kv_heads, TILE)
    if (places := layout.places_of(k)) is not None:
        k, v = (gather_rows(x, *places) for x in (k, v))
    if mods.ask:
        group = q.shape[1] // num_kv_heads
        mods = mods.moved(regrouped_origin(groups, layout, q.shape[2], group))
    routed_out, routed_lse = attend(
        gather_rows(rows, groups.row, groups.slot),
        k,
        v,
        routed_block_mask(groups, layout, mods.on_masks()),
        scale,
        lse=True,
        score_mod=mods.on_scores(),
    )

    own_out, own_lse = own_out.reshape(*rows.shape[:3], -1), own_lse.reshape(rows.shape[:3])
    out, lse = merge_parts(own_out, own_lse, routed_out, routed_lse, groups)
    return out.view(*q.shape[:3], -1), lse.view(q.shape[:3])


@in_one_graph
def _attend_masked(request: Request) -> Result:
    """Attend in natural order; FlexAttention skips the tiles that no query chose."""
    routing, (q, scale) = route_request(request), _scaled_up(request)
    k, v, mods = request.k, request.v, request.mods
    mask = routing_to_block_mask(routing, mods.on_masks())
    if not on_cpu(q):
        return attend(q, k, v, mask, scale, lse=request.lse, score_mod=mods.on_scores())
    out, no_lse = attend(q, k, finite(v), mask, scale, lse=False, score_mod=mods.on_scores())
    bad_key = None
    if mods.mask_mod is not None:
        # Only FlexAttention knows what a query sees under a mask_mod. With equal scores every key
        # that is seen has a weight, so attention to marks tells whether a marked key is seen.
        bad_key = ~(k.isfinite().all(3, keepdim=True) & v.isfinite().all(3, keepdim=True))
        marks = torch.cat((bad_key, torch.ones_like(bad_key)), dim=3).to(q.dtype)
        bad_key = attend(q * 0, k * 0, F.pad(marks, (0, 14)), mask, scale, lse=False)[0]
    return show_spoilt(out, q, k, v, *routing.parts, bad_key), no_lse
