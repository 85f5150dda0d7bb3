"""Generation by models of transformers: a cache changes how fast tokens come, not which."""

from typing import Any

import pytest
import torch
from torch import Tensor

transformers: Any = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache  # noqa: E402

from moba_flex import MoBAConfig  # noqa: E402
from moba_flex.compile import decode  # noqa: E402
from moba_flex.integrations.cache import BlockDynamicLayer, BlockStaticLayer, adopt  # noqa: E402
from moba_flex.integrations.transformers import apply  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
WINDOW = {"head_dim": 8, "sliding_window": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None}
# Options of a model, and the layers with a window, which keep their own attention.
MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "Llama": ({}, ()),
    "Qwen3": ({"head_dim": 8}, ()),
    "Mistral": ({"sliding_window": None}, ()),
    "Gemma2": ({**WINDOW, "query_pre_attn_scalar": 8}, (0,)),
    "GptOss": ({**WINDOW, **EXPERTS}, (0,)),
}
NEW = 16  # tokens to generate
LENGTH = 50


def build(name: str, **options: Any) -> Any:
    """Return a tiny model, whose weights are large enough for tokens to depend on the context."""
    sizes, windows = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return apply(model, MoBAConfig(8, 3, **{"dense_layers": windows, **options}))


def prompt(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def generate(model: Any, x: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    mask = torch.ones_like(x) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(x, attention_mask=mask, **options)


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[Any, Tensor]:
    """A model, and what it generates without a cache: a full forward at each step."""
    model = build(request.param)
    want = generate(model, prompt(), use_cache=False)
    assert want[:, LENGTH:].unique().numel() > 4  # no constant output, which any cache would give
    return model, want


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 1000},
        {"cache_implementation": "static", "prefill_chunk_size": 7},
    ],
    ids=str,
)
def test_tokens_are_those_of_full_forwards(
    case: tuple[Any, Tensor], options: dict[str, Any]
) -> None:
    model, want = case
    assert torch.equal(generate(model, prompt(), **options), want)


@pytest.mark.parametrize("static", [False, True])
def test_a_prompt_of_several_long_chunks(case: tuple[Any, Tensor], static: bool) -> None:
    """The last chunk is short, and no chunk ends where a block does."""
    model, x = case[0], prompt(rows=1, length=141)
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    want = generate(model, x, use_cache=False)
    assert torch.equal(generate(model, x, prefill_chunk_size=61, **options), want)
    assert torch.equal(generate(model, x, prefill_chunk_size=64, **options), want)


@pytest.mark.parametrize("padded", [False, True])
def test_steps_of_short_caches_read_all_keys_under_a_mask(
    monkeypatch: pytest.MonkeyPatch, padded: bool
) -> None:
    """On CPU, where copies of the chosen keys would cost more; not for rows that are padded."""
    model, x = build("Llama"), prompt()
    apply(model, MoBAConfig(16, 3))
    mask = torch.ones_like(x)
    mask[0, :5] = 0 if padded else 1
    want = generate(model, x, mask, use_cache=False)
    calls, attend_to_all = [], decode._attend_to_all

    def count(*args: Any) -> Any:
        calls.append(args)
        return attend_to_all(*args)

    monkeypatch.setattr(decode, "_attend_to_all", count)
    assert torch.equal(generate(model, x, mask), want)
    assert len(calls) == (0 if padded else 2 * NEW)  # layers, and calls


def test_guesses_that_are_rejected_leave_no_trace(case: tuple[Any, Tensor]) -> None:
    model, want = case
    got = generate(model, prompt()[:1], prompt_lookup_num_tokens=4)
    assert torch.equal(got, want[:1])
    if model.config.model_type == "llama":
        got = generate(model, prompt()[:1], assistant_model=model)
        assert torch.equal(got, want[:1])


def test_beams(case: tuple[Any, Tensor]) -> None:
    model, _ = case
    want = generate(model, prompt(), num_beams=3, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}):
        assert torch.equal(generate(model, prompt(), num_beams=3, **options), want)


def test_sampling(case: tuple[Any, Tensor]) -> None:
    model, _ = case
    rows = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        some: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2}
        rows.append(generate(model, prompt(), use_cache=use_cache, **some))
    assert torch.equal(*rows)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_rows_padded_on_the_left(case: tuple[Any, Tensor], options: dict[str, Any]) -> None:
    model, _ = case
    x, mask = prompt(), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :9] = 0
    for chunk in (None, 7):  # all of the first chunk is padding
        got = generate(model, x.where(mask == 1, 0), mask, prefill_chunk_size=chunk, **options)
        alone = generate(model, x[1:, 9:])
        assert torch.equal(got[1, 9:], alone[0])


def test_layers_with_block_keys_are_those_that_route(case: tuple[Any, Tensor]) -> None:
    model, _ = case
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
    kinds = [isinstance(x, BlockDynamicLayer) for x in cache.layers]
    dense = model.config.moba_flex["dense_layers"]
    assert kinds == [i not in dense for i in range(2)]


@pytest.mark.parametrize("static", [False, True])
def test_a_call_with_cached_keys_pools_none(
    case: tuple[Any, Tensor], static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the block keys that the cache keeps."""
    model, _ = case
    x, sizes = prompt(), {"config": model.config}
    cache = StaticCache(max_cache_len=LENGTH + NEW, **sizes) if static else DynamicCache(**sizes)
    with torch.no_grad():
        model(x, past_key_values=cache)
        monkeypatch.setattr("moba_flex.masks.router.pool", None)
        for length in (NEW - 1, 1):
            model(x[:, :length], past_key_values=cache)


@pytest.mark.parametrize("kind", ["no config", "filled", "static", "filled static"])
def test_any_cache_of_transformers_is_taken(kind: str) -> None:
    """Also one that a model with other attention has filled."""
    model, x = build("Llama"), prompt()
    static = StaticCache(config=model.config, max_cache_len=LENGTH + 3)
    cache = static if "static" in kind else DynamicCache()
    with torch.no_grad():
        want = model(x, use_cache=False).logits[:, -1:]
        if "filled" in kind:
            plain = transformers.LlamaModel(model.config)
            plain.load_state_dict(model.model.state_dict())
            apply(plain, MoBAConfig(8, 3, cached="refuse", dense_layers=(0, 1)))
            plain(x[:, :-1], past_key_values=cache)
            # Keys of layer 1 follow dense attention in layer 0.
            apply(model, MoBAConfig(8, 3, dense_layers=(0,)))
            want = model(x[:, -1:], past_key_values=DynamicCache(tuples(cache))).logits
        else:
            model(x[:, :-1], past_key_values=cache)
        got = model(x[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(got, want)
    kinds = BlockDynamicLayer, BlockStaticLayer
    assert isinstance(cache.layers[1], kinds)


def tuples(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Copy the keys and values in use."""
    used = LENGTH - 1
    return [(x.keys[:, :, :used].clone(), x.values[:, :, :used].clone()) for x in cache.layers]


def test_a_cache_of_fixed_length_in_a_compiled_model() -> None:
    """One graph serves all steps; tokens are the same."""
    model, x = build("Llama"), prompt()
    want = generate(model, x)
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    cache = StaticCache(config=model.config, max_cache_len=LENGTH + NEW)
    compiled: Any = torch.compile(model, backend=count, fullgraph=True)
    with torch.no_grad():
        token = model(x, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens = [token]
        for at in range(LENGTH, LENGTH + NEW - 1):
            position_ids = torch.tensor([[at]])
            out = compiled(token, past_key_values=cache, position_ids=position_ids)
            token = out.logits.argmax(-1)
            tokens.append(token)
    assert torch.equal(torch.cat(tokens, dim=1), want[:, LENGTH:])
    assert graphs == 1


def test_prefill_sparse_and_decode_dense() -> None:
    """The paper's setting."""
    model, x = build("Llama", cached="dense"), prompt()
    with torch.no_grad():
        first = model(x, use_cache=True)
        second = model(x[:, :1], past_key_values=first.past_key_values).logits
        sparse = build("Llama")
        apply(sparse, MoBAConfig(8, 100))  # covers all
        cache: Any = DynamicCache([(k, v) for k, v, *_ in first.past_key_values])
        for layer in cache.layers:
            layer.crop(-1)
        want = sparse(x[:, :1], past_key_values=cache).logits
    torch.testing.assert_close(second, want)


@pytest.mark.parametrize("static", [False, True])
def test_a_schedule_of_layers_and_of_decode(static: bool) -> None:
    """Each call is that of a model which has the numbers of this call alone."""
    x = prompt()
    model = build("Llama", layer_top_k=(2, 3), decode_top_k=5)
    rows = (2,) * 4, (3,) * 4
    calls = [build("Llama", head_top_k=rows), *[apply(build("Llama"), MoBAConfig(8, 5))] * 2]
    caches: list[Any] = [
        StaticCache(model.config, LENGTH + 9) if static else DynamicCache() for _ in range(2)
    ]
    others = build("Llama"), apply(build("Llama"), MoBAConfig(8, 3, layer_top_k=(3, 2)))
    with torch.no_grad():
        for alone, part in zip(calls, (x, x[:, :8], x[:, 8:9]), strict=True):
            got = model(part, past_key_values=caches[0]).logits
            torch.testing.assert_close(got, alone(part, past_key_values=caches[1]).logits)
            if part is x:  # the numbers matter
                assert all((got - other(x).logits).abs().max() > 1e-3 for other in others)
        assert not torch.equal(got, calls[0](part, past_key_values=fresh(caches[1], 58)).logits)


def test_a_graph_cannot_tell_a_prompt_from_later_tokens() -> None:
    model, x = build("Llama", cached="dense"), prompt()
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + NEW)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    message = "cached must be 'route', and decode_top_k None, in a graph of several queries and"
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        compiled(x, past_key_values=cache)


def test_holes_in_a_mask_are_refused() -> None:
    model, x = build("Llama"), prompt()
    with torch.no_grad():
        cache = model(x, use_cache=True).past_key_values
        mask = torch.ones(2, LENGTH + 1, dtype=torch.int64)
        mask[0, LENGTH - 3 : LENGTH] = 0  # padded on the right
        with pytest.raises(ValueError, match="ones from the first token on in a call with cached"):
            model(x[:, :1], past_key_values=cache, attention_mask=mask)


def test_layers_refuse_what_they_cannot_do() -> None:
    layer = BlockDynamicLayer(8)
    with pytest.raises(ValueError, match="tokens_to_remove must be at most 0, got 1"):
        layer.crop(1)
    with pytest.raises(ValueError, match="cache must stay on its device, got a call to offload"):
        layer.offload()


@pytest.mark.parametrize("static", [False, True])
def test_a_refused_update_leaves_a_layer_as_it_was(static: bool) -> None:
    """Whether it is the first or a later one."""
    layer: Any = BlockStaticLayer(8, 64) if static else BlockDynamicLayer(8)
    before = vars(layer).copy()
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match="must"):
            layer.update(torch.ones(1, 2, 5, 8), torch.ones(1, 2, 4, 8))
        if static:
            with pytest.raises(ValueError, match="max_len must be"):
                layer.update(*torch.ones(2, 1, 2, 65, 8))
    assert vars(layer) == before
    layer.update(*(new := torch.randn(2, 3, 1, 20, 16)))
    before = vars(layer).copy()
    with pytest.raises(ValueError, match="k must have shape"):
        layer.update(*torch.ones(2, 1, 2, 1, 8))
    if static:
        with pytest.raises(ValueError, match="max_len must be"):
            layer.update(*torch.ones(2, 3, 1, 45, 16))
    assert vars(layer) == before
    assert layer.get_seq_length() == 20
    assert torch.equal(layer.keys[:, :, :20], new[0])


def test_a_refused_update_leaves_keys_that_a_caller_has_cut() -> None:
    layer = BlockDynamicLayer(8)
    layer.update(*(new := torch.randn(2, 1, 2, 40, 8)))
    assert layer.keys is not None
    layer.keys, layer.values = layer.keys[:, :, 3:30], layer.values[:, :, 3:30]
    for _ in range(2):
        with pytest.raises(ValueError, match="k must have shape"):
            layer.update(*torch.ones(2, 1, 2, 1, 16))
    keys, values = layer.update(*new[:, :, :, 30:])
    assert torch.equal(keys, new[0, :, :, 3:])
    assert torch.equal(values, new[1, :, :, 3:])


def test_an_offloaded_cache_stays_as_it_is() -> None:
    cache: Any = DynamicCache()
    cache.offloading = True
    adopt(cache, MoBAConfig(8, 3), 2)
    assert cache.layers == []


def test_a_model_switched_back_has_plain_caches() -> None:
    model = build("Llama")
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        cache = model(prompt(), past_key_values=DynamicCache()).past_key_values
    assert not any(isinstance(layer, BlockDynamicLayer) for layer in cache.layers)


def fresh(cache: Any, length: int) -> Any:
    """Return a cache of the same keys and values, without block keys."""
    parts = [
        (x.keys[:, :, :length].clone(), x.values[:, :, :length].clone()) for x in cache.layers
    ]
    return DynamicCache(parts)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("turns", ["mask, none", "none, mask", "mask, new tokens' mask"])
def test_masks_that_change_from_turn_to_turn(turns: str, static: bool) -> None:
    """Block keys of rows that start elsewhere are not taken."""
    model, x = build("Llama"), prompt()
    mask, longer = (torch.ones(2, n, dtype=torch.int64) for n in (LENGTH, LENGTH + 10))
    mask[1, :9] = longer[1, :9] = 0
    first = mask if turns.startswith("mask") else None
    second = {"none": None, "mask": longer, "new tokens' mask": longer[:, :10] * 0 + 1}
    cache: Any = StaticCache(model.config, LENGTH + 10) if static else DynamicCache()
    with torch.no_grad():
        model(x, past_key_values=cache, attention_mask=first)
        other = fresh(cache, LENGTH)
        later = {"attention_mask": second[turns.partition(", ")[2]]}
        want = model(x[:, :10], past_key_values=other, **later).logits
        got = model(x[:, :10], past_key_values=cache, **later).logits
    torch.testing.assert_close(got, want)


def test_keys_that_a_caller_has_cut() -> None:
    model, x = build("Llama"), prompt()
    cache: Any = DynamicCache()
    with torch.no_grad():
        model(x, past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, 3:40], layer.values[:, :, 3:40]
        want = model(x[:, :5], past_key_values=fresh(cache, 37)).logits
        got = model(x[:, :5], past_key_values=cache).logits
    assert cache.get_seq_length() == 42
    torch.testing.assert_close(got, want)


def test_gradients_pass_through_a_cache_that_is_handed_in() -> None:
    model, x = build("Llama"), prompt()
    grads = []
    for options in ({"past_key_values": DynamicCache()}, {"use_cache": False}):
        model.zero_grad()
        model(x, labels=x, **options).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=str)
def test_autocast(options: dict[str, Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(build("Llama"), prompt(), **options).shape == (2, LENGTH + NEW)
