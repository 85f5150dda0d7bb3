"""The module does what the function does, with the options that it keeps."""

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.functional import scaled_dot_product_attention

from moba_flex import MoBAAttention, moba_attention
from moba_flex.module import CallOptions
from tests.case import Case

CASE = Case(2, 2, 2, 120, 130)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"sink_blocks": 1, "local_blocks": 1, "plan": "routed"},
    {"causal": False, "scale": 0.3},
    {"softcap": 5.0},
    {"head_top_k": (1, 2, 3, 4)},
]


def late(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + 0.01 * kv_idx


def even(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx % 2 == 0


INPUTS: list[dict[str, Any]] = [
    {},
    {"cu_seqlens": torch.tensor([0, 50, 130]), "cu_seqlens_q": torch.tensor([0, 45, 120])},
    {"key_mask": torch.arange(130) >= torch.tensor([[0], [33]])},
    {"score_mod": late, "mask_mod": even},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_module_is_the_function(options: dict[str, Any], inputs: dict[str, Any]) -> None:
    q, k, v = qkv = [x.requires_grad_() for x in CASE.inputs()]
    got = MoBAAttention(16, 4, **options)(q, k, v, **inputs)
    numbers = options.get("head_top_k")
    tensors = {"head_top_k": None if numbers is None else torch.tensor(numbers)}
    want = moba_attention(q, k, v, block_size=16, top_k=4, **(options | inputs | tensors))
    assert torch.equal(got, want)
    weight = torch.randn_like(want)
    grads = [torch.autograd.grad(x, qkv, weight) for x in (got, want)]
    assert all(map(torch.equal, *grads))


def test_log_sum_exp() -> None:
    out, aux = MoBAAttention(16, 4)(*CASE.inputs(), return_aux=AuxRequest(lse=True))
    assert out.shape == (2, 4, 120, CASE.head_dim)
    assert aux.lse.shape == (2, 4, 120)


def test_module_takes_every_argument_of_the_function() -> None:
    methods = (MoBAAttention.__init__, MoBAAttention.forward)
    taken = [{*inspect.signature(method).parameters} - {"self"} for method in methods]
    taken[1] = taken[1] - {"options"} | {*CallOptions.__annotations__}
    assert not taken[0] & taken[1]
    assert taken[0] | taken[1] == {*inspect.signature(moba_attention).parameters}


def test_a_model_is_sparse_or_dense() -> None:
    q, k, v = Case(1, 2, 2, 130, 130).inputs()
    module = MoBAAttention(16, 2)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (module(q, k, v) - dense).abs().max() > 0.01
    module.top_k = 9
    torch.testing.assert_close(module(q, k, v), dense)


def test_nothing_is_saved_and_numbers_stay_what_they_are() -> None:
    """On whatever device the module is made, and wherever and to whatever dtype it is moved."""
    q, k, v = Case(1, 1, 2, 100, 100).inputs()
    want = moba_attention(q, k, v, block_size=16, top_k=4, head_top_k=torch.tensor([1, 3]))
    with torch.device("meta"):
        made = MoBAAttention(16, 4, head_top_k=[1, 3])
        assert "head_top_k=[1, 3]" in repr(made)
    for module in (
        made.to_empty(device="cpu"),
        copy.deepcopy(made).to("meta", torch.bfloat16).half(),
        MoBAAttention(16, 4, head_top_k=torch.tensor([1, 3])),
        MoBAAttention(16, 4, head_top_k=np.array([1, 3])),  # type: ignore[arg-type]
        pickle.loads(pickle.dumps(made)),
    ):
        assert not module.state_dict()
        assert not list(module.parameters())
        assert torch.equal(module(q, k, v), want)
    module.head_top_k = [4, 4]
    assert torch.equal(module(q, k, v), MoBAAttention(16, 4)(q, k, v))


def test_numbers_of_heads_on_fake_tensors_and_in_graphs() -> None:
    q, k, v = Case(1, 1, 2, 100, 100).inputs()
    module = MoBAAttention(16, 4, head_top_k=[1, 3])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        assert module(*fakes).shape == q.shape
    assert module(*fakes).shape == q.shape
    want = module(q, k, v)  # what was fake is not kept
    with torch.inference_mode():
        assert torch.equal(module(q, k, v), want)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), want)
    with pytest.raises(ValueError, match="head_top_k must hold numbers that can be read, got a"):
        MoBAAttention(16, 4, head_top_k=torch.tensor([1, 3], device="meta"))


def test_print_says_the_options() -> None:
    module = MoBAAttention(512, 3, softcap=30.0, head_top_k=[1, 3])
    assert repr(module) == (
        "MoBAAttention(block_size=512, top_k=3, sink_blocks=0, local_blocks=0, causal=True, "
        "scale=None, softcap=30.0, plan='auto', head_top_k=[1, 3])"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"sink_blocks": 4}, ValueError, "top_k must be at least 1 \\+ sink_blocks"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive and finite, got -1.0"),
    ],
)
def test_options_are_checked_at_once(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MoBAAttention(**{"block_size": 16, "top_k": 4, **options})


def test_the_plan_and_numbers_of_heads_are_checked_in_a_call() -> None:
    with pytest.raises(ValueError, match="plan must be one of"):
        MoBAAttention(16, 4, plan="flash")(*CASE.inputs())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"head_top_k must have shape \[Hq\] = \(4,\) or \[B, Hq\], got \(3,\)"
    ):
        MoBAAttention(16, 4, head_top_k=[1, 2, 3])(*CASE.inputs())
