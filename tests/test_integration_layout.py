"""Padded batches, packed documents, soft caps and sinks in tiny random models."""

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("transformers")
import transformers
from transformers import DataCollatorWithFlattening

from moba_flex.cli import pretrained
from moba_flex.config import MoBAConfig
from moba_flex.integrations.layout import _marks_of
from moba_flex.integrations.transformers import apply, observe
from tests.test_transformers import ALL, FULL, LENGTH, SIZES, SMALL, build, tokens

WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},
    "Gemma2": {"layer_types": FULL, "attn_logit_softcapping": 1.5},
    "GptOss": {"layer_types": FULL, "num_local_experts": 4, "num_experts_per_tok": 2},
}
# Padding before and after each of four rows; the last is nothing else.
PADS = {
    "left": [(0, 0), (9, 0), (20, 0), (44, 0)],
    "right": [(0, 0), (0, 9), (0, 20), (0, 44)],
    "both": [(5, 9), (17, 3), (0, 20), (LENGTH, 0)],
}
# The norms of a float64 model compute in float32: what differs in the last place of float64 may
# differ in its.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def model_of(name: str, config: MoBAConfig = SMALL, **options: Any) -> Any:
    """Return a model in float64, so that rows of other lengths choose the same blocks."""
    return apply(drawn(name, **options), config)


def drawn(name: str, **options: Any) -> Any:
    """Return the model, the same one every time, with PyTorch's attention."""
    model = build(name, **{**MODELS.get(name, {}), **options}).double()
    if name == "GptOss":
        model.set_experts_implementation("eager")  # the other takes no float64
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # some are left uninitialised
        parameter.data = torch.randn(parameter.shape, generator=generator).double() * 0.3
    return model


def mask_of(pads: list[tuple[int, int]]) -> Tensor:
    mask = torch.ones(len(pads), LENGTH, dtype=torch.int64)
    for row, (left, right) in zip(mask, pads, strict=True):
        row[:left] = 0
        row[LENGTH - right :] = 0
    return mask


def row_by_row(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the logits of the real tokens of each row, run alone."""
    rows = [row[real.bool()][None] for row, real in zip(ids, mask, strict=True)]
    return [model(row).logits[0] if row.numel() else torch.empty(0, 61).double() for row in rows]


@pytest.mark.parametrize("side", list(PADS))
@pytest.mark.parametrize("name", list(MODELS))
def test_a_padded_batch_is_its_rows(name: str, side: str) -> None:
    model, ids, mask = model_of(name), tokens(4), mask_of(PADS[side])
    want = row_by_row(model, ids, mask)
    # Rotary positions count from anywhere: with and without those of the real tokens.
    for positions in (None, (mask.cumsum(1) - 1).clamp(min=0)):
        got = model(ids, attention_mask=mask, position_ids=positions).logits
        assert got.isfinite().all()
        torch.testing.assert_close(got[mask.bool()], torch.cat(want), **CLOSE)
    ids[mask == 0] = 7
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits[mask.bool()], torch.cat(want), **CLOSE
    )


def test_a_bidirectional_padded_batch_is_its_rows() -> None:
    options: dict[str, Any] = {"global_attn_every_n_layers": 1, "layer_types": FULL}
    model = apply(build("ModernBert", pad_token_id=0, **options).double(), SMALL)
    ids, mask = tokens(3), mask_of(PADS["right"][:3])
    got = model(ids, attention_mask=mask)[0]
    for row in range(3):
        real = mask[row].bool()
        want = model(ids[row : row + 1, real])[0][0]
        torch.testing.assert_close(got[row, real], want, **CLOSE)


def gradients(model: Any) -> list[Tensor]:
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return grads


@pytest.mark.parametrize("side", list(PADS))
@pytest.mark.parametrize("name", ["Llama", "GptOss"])
def test_a_padded_batch_trains_as_its_rows(name: str, side: str) -> None:
    model, ids, mask = model_of(name).train(), tokens(4), mask_of(PADS[side])
    weight = torch.randn(61, generator=torch.Generator().manual_seed(2)).double()
    (model(ids, attention_mask=mask).logits[mask.bool()] @ weight).sum().backward()
    got = gradients(model)
    (torch.cat(row_by_row(model, ids, mask)) @ weight).sum().backward()
    for grad, want in zip(got, gradients(model), strict=True):
        assert grad.isfinite().all()
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def documents() -> tuple[list[Tensor], Tensor, Tensor]:
    """Return documents, and the same packed into two rows with their position_ids."""
    cuts = ([20, 1, 24], [9, 36])
    ids, parts = tokens(), []
    for row, lengths in zip(ids, cuts, strict=True):
        parts += row.split(lengths)
    positions = torch.stack([torch.cat([torch.arange(n) for n in cut]) for cut in cuts])
    return parts, ids, positions


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_packed_documents_are_separate_ones(name: str, cache: bool) -> None:
    model = model_of(name)
    parts, ids, positions = documents()
    want = torch.cat([model(part[None]).logits[0] for part in parts])
    got = model(ids, position_ids=positions, use_cache=cache).logits
    torch.testing.assert_close(got.flatten(0, 1), want, **CLOSE)
    model.set_attn_implementation("eager")
    unlike = model(ids, position_ids=positions, use_cache=False).logits
    assert (got - unlike).abs().max() > 0.01


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
@pytest.mark.parametrize("cache", [False, True])
def test_documents_of_the_collator_are_separate_ones(name: str, cache: bool) -> None:
    model = model_of(name)
    parts, _, _ = documents()
    collate: Any = DataCollatorWithFlattening(return_flash_attn_kwargs=True)  # type: ignore[no-untyped-call]
    batch = collate([{"input_ids": part.tolist()} for part in parts])
    batch.pop("labels")
    want = torch.cat([model(part[None]).logits[0] for part in parts])
    torch.testing.assert_close(model(**batch, use_cache=cache).logits[0], want, **CLOSE)


def test_dense_layers_keep_documents_and_padding_apart() -> None:
    model = model_of("Llama", MoBAConfig(8, 2, dense_layers=(0, 2)))
    parts, ids, positions = documents()
    want = torch.cat([model(part[None]).logits[0] for part in parts])
    got = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got.flatten(0, 1), want, **CLOSE)
    mask = mask_of(PADS["both"])
    want = torch.cat(row_by_row(model, tokens(4), mask))
    got = model(tokens(4), attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(got, want, **CLOSE)


def test_observers_see_the_layout() -> None:
    model = model_of("Llama")
    calls: list[Any] = []
    _, ids, positions = documents()
    mask = mask_of(PADS["left"][:2])
    with observe(lambda *call: calls.append(call)):
        model(ids, position_ids=positions, use_cache=False)
        model(ids, attention_mask=mask)
    packed, padded = calls[0], calls[3]
    assert packed[1].shape == (1, 4, 2 * LENGTH, 8)
    assert packed[6]["cu_seqlens"].tolist() == [0, 20, 21, 45, 54, 90]
    assert torch.equal(padded[6]["key_mask"], mask.bool())


# Two documents in a row of 45 tokens, told in each way.

TWO = torch.cat([torch.arange(20), torch.arange(25)])[None]
STARTS = torch.tensor([0, 20, LENGTH], dtype=torch.int32)
INDEX = (torch.arange(LENGTH) >= 20).int()[None]
ROTARY = {"position_ids": TWO}
CU_SEQ_LENS = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS.clone()}
SAID: dict[str, dict[str, Any]] = {
    "position_ids": ROTARY,
    "position_ids and a mask": {**ROTARY, "attention_mask": torch.ones(1, LENGTH)},
    "seq_idx": {"seq_idx": INDEX},
    "both": {**ROTARY, "seq_idx": INDEX},
    "cu_seq_lens": CU_SEQ_LENS,
    "all": {**ROTARY, **CU_SEQ_LENS, "seq_idx": INDEX, "max_length_q": 25, "max_length_k": 25},
}


def apart(model: Any, ids: Tensor) -> Tensor:
    """Return what the two documents give alone."""
    return torch.cat([model(ids[:, :20])[0], model(ids[:, 20:])[0]], dim=1)


@pytest.mark.parametrize("said", list(SAID))
def test_documents_may_be_told_in_each_way(said: str) -> None:
    model = model_of("Llama")
    got = model(tokens(1), **SAID[said]).logits
    torch.testing.assert_close(got, apart(model, tokens(1)), **CLOSE)


OTHERS: dict[str, dict[str, Any]] = {
    "Persimmon": {},
    "GPTBigCode": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 128},
    "ModernBert": {"global_attn_every_n_layers": 1, "layer_types": FULL},
    "Llama": {},
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_documents_are_apart_in_models_that_do_not_hand_positions_on(name: str) -> None:
    model = apply(build(name, **OTHERS[name]).double(), SMALL)
    want = apart(model, tokens(1))
    torch.testing.assert_close(model(tokens(1), position_ids=TWO)[0], want, **CLOSE)


def test_positional_arguments_count_too() -> None:
    model = model_of("Llama")
    got = model(tokens(1), torch.ones(1, LENGTH), TWO).logits
    torch.testing.assert_close(got, apart(model, tokens(1)), **CLOSE)
    got = model.model(tokens(1), None, TWO)[0]
    torch.testing.assert_close(got, apart(model.model, tokens(1)), **CLOSE)


def test_nothing_is_remembered_from_call_to_call() -> None:
    model, ones = model_of("Llama"), torch.ones(2, LENGTH)
    positions = torch.arange(LENGTH)[None].clone()
    plain = model(tokens(1), attention_mask=ones[:1], position_ids=positions).logits
    positions.copy_(TWO)  # a buffer that a loop fills again
    got = model(tokens(1), attention_mask=ones[:1], position_ids=positions).logits
    torch.testing.assert_close(got, apart(model, tokens(1)), **CLOSE)
    got = model(tokens(2), attention_mask=ones, position_ids=positions).logits
    torch.testing.assert_close(got, apart(model, tokens(2)), **CLOSE)
    torch.testing.assert_close(model(tokens(1)).logits, plain, **CLOSE)


def test_nothing_is_remembered_of_a_call_that_was_interrupted() -> None:
    model = model_of("Llama")

    def interrupt(*call: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(1), position_ids=TWO)
    handle.remove()
    one = apply(build("Llama").double(), SMALL)
    one.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens(1)).logits, one(tokens(1)).logits, **CLOSE)


def test_threads_do_not_mix_their_documents() -> None:
    model, found = model_of("Llama"), {}

    def call(number: int) -> None:
        positions = TWO if number % 2 else torch.arange(LENGTH)[None]
        with torch.no_grad():
            found[number] = [model(tokens(1), position_ids=positions).logits for _ in range(5)]

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in found.items():
        want = apart(model, tokens(1)) if number % 2 else model(tokens(1)).logits
        for got in results:
            torch.testing.assert_close(got, want, **CLOSE)


def test_copies_read_documents_as_well() -> None:
    model = model_of("Llama")
    want = apart(model, tokens(1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), apply(model, SMALL)):
        got = other(tokens(1), **SAID["seq_idx"]).logits
        torch.testing.assert_close(got, want, **CLOSE)
    model.set_attn_implementation("sdpa")
    model(tokens(1), position_ids=TWO, attention_mask=torch.full((1, LENGTH), 2))


def test_checkpointing_keeps_documents_and_padding_apart() -> None:
    model, mask = model_of("Persimmon").train(), torch.ones(1, LENGTH)
    mask[:, 36:] = 0
    call: dict[str, Any] = {"position_ids": TWO, "attention_mask": mask, "use_cache": False}
    model(tokens(1), **call).logits[:, :36].square().mean().backward()
    want = gradients(model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    model(tokens(1), **call).logits[:, :36].square().mean().backward()
    for grad, other in zip(gradients(model), want, strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("name", [*MODELS, "Persimmon"])
def test_documents_may_come_beside_padding(name: str, windows: bool) -> None:
    config = MoBAConfig(8, 2, dense_layers=(0, 2) if windows else ())
    windowed = windows and name in ("Gemma2", "GptOss")
    options: dict[str, Any] = {"layer_types": WINDOWS, "sliding_window": 9} if windowed else {}
    model = model_of(name, config, **options)
    ids, mask, positions = tokens(3), torch.ones(3, LENGTH), torch.zeros(3, LENGTH).long()
    parts = [(0, 5, 20), (0, 20, LENGTH), (1, 0, 12), (1, 12, 33), (2, 3, 24), (2, 24, 41)]
    mask[0, :5] = mask[1, 33:] = mask[2, :3] = mask[2, 41:] = 0
    for row, start, stop in parts:
        positions[row, start:stop] = torch.arange(stop - start)
    got = model(ids, attention_mask=mask, position_ids=positions).logits
    assert got.isfinite().all()
    for row, start, stop in parts:
        want = model(ids[row : row + 1, start:stop]).logits[0]
        torch.testing.assert_close(got[row, start:stop], want, **CLOSE)


def test_chunks_count_from_each_document() -> None:
    options: dict[str, Any] = {
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "attention_chunk_size": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "moe_layers": [],
    }
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**{**SIZES, **options})
    model: Any = transformers.Llama4ForCausalLM(config)
    apply(model.eval(), MoBAConfig(8, 2, dense_layers=(0, 2)))
    want = apart(model, tokens(1))
    for cache in (False, True):
        got = model(tokens(1), position_ids=TWO, use_cache=cache).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_positions_of_images_restart_with_documents() -> None:
    three = torch.stack([TWO, TWO, TWO])
    three[1:, :, 5:8] = 9  # an image
    want = torch.arange(LENGTH)[None] == 20
    for parts in (three, torch.stack([TWO, *three])):
        assert torch.equal(_marks_of("position_ids", parts, (1, LENGTH)), want)


def saved(model: Any, folder: Path) -> Any:
    """Return the model as `from_pretrained` alone gives it: without hooks."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, attn_implementation="moba_flex").double().eval()


@pytest.mark.parametrize("said", list(SAID))
def test_layers_read_what_they_are_handed(said: str, tmp_path: Path) -> None:
    model = model_of("Llama")
    got = saved(model, tmp_path)(tokens(1), **SAID[said]).logits
    torch.testing.assert_close(got, apart(model, tokens(1)), **CLOSE)


def test_layers_that_nobody_tells_refuse(tmp_path: Path) -> None:
    model = model_of("Persimmon")
    reloaded = saved(model, tmp_path)
    with pytest.raises(ValueError, match="position_ids must reach the attention layers, got none"):
        reloaded(tokens(1), position_ids=TWO)
    got = apply(reloaded)(tokens(1), position_ids=TWO).logits
    torch.testing.assert_close(got, apart(model, tokens(1)), **CLOSE)


CLASHES: dict[str, tuple[dict[str, Any], str]] = {
    "seq_idx": (
        {**ROTARY, "seq_idx": INDEX.roll(3)},
        "position_ids must start documents where cu_seq_lens_q or seq_idx does, got other places",
    ),
    "cu_seq_lens": (
        {**ROTARY, "cu_seq_lens_q": STARTS - 1, "cu_seq_lens_k": STARTS - 1},
        "position_ids must start documents where cu_seq_lens_q or seq_idx does, got other places",
    ),
    "seq_idx and cu_seq_lens": (
        {**CU_SEQ_LENS, "seq_idx": torch.zeros(1, LENGTH, dtype=torch.int32)},
        "seq_idx must start documents where cu_seq_lens_q or seq_idx does, got other places",
    ),
    "other keys": (
        {**CU_SEQ_LENS, "cu_seq_lens_q": torch.tensor([0, 30, LENGTH], dtype=torch.int32)},
        "cu_seqlens_q must give document 0 at most as many queries as keys, 20, got 30",
    ),
    "more keys": (
        {**CU_SEQ_LENS, "cu_seq_lens_q": torch.tensor([0, LENGTH], dtype=torch.int32)},
        r"must have the same shape \[documents \+ 1\], got \(2,\) and \(3,\)",
    ),
    "numbers": (
        {"attention_mask": INDEX + 1},
        "attention_mask must hold zeros and ones, got other numbers",
    ),
    "a mask to add": (
        {"attention_mask": torch.zeros(1, LENGTH) - torch.inf},
        "attention_mask must hold zeros and ones, got other numbers",
    ),
    "shape": (
        {"attention_mask": torch.ones(1, LENGTH), "seq_idx": INDEX[:, 1:]},
        r"seq_idx must have shape \[B, L\] = \(1, 45\), or three parts of it, got \(1, 44\)",
    ),
    "unknown": (
        {"document_ids": INDEX},
        "attention must have no arguments that it does not know, got document_ids",
    ),
}


@pytest.mark.parametrize("clash", list(CLASHES))
def test_refuses_signals_that_contradict_each_other(clash: str) -> None:
    said, message = CLASHES[clash]
    with pytest.raises(ValueError, match=message):
        model_of("Llama")(tokens(1), **said)


def test_refuses_documents_in_a_call_with_cached_keys() -> None:
    model = model_of("Llama", MoBAConfig(8, 2, cached="dense"))
    for name in ("position_ids", "seq_idx"):
        cache = model(tokens(1)).past_key_values
        with pytest.raises(ValueError, match="must go on in a call with cached keys, got packed"):
            model(tokens(1), past_key_values=cache, **SAID[name])


# Tensors whose values nobody knows.


@pytest.mark.parametrize("mode", ["meta", "fake"])
@pytest.mark.parametrize("layers", [FULL, WINDOWS])
def test_runs_without_values(mode: str, layers: list[str]) -> None:
    with FakeTensorMode() if mode == "fake" else torch.device("meta"):
        model = build("Gemma2", layer_types=layers, sliding_window=9)
        apply(model, MoBAConfig(8, 2, dense_layers=(0, 2)))
        ids, mask = torch.zeros(2, LENGTH, dtype=torch.int64), torch.ones(2, LENGTH)
        positions = torch.arange(LENGTH)[None]
        for said in (
            {},
            {"attention_mask": mask},
            {"position_ids": positions},
            {"attention_mask": mask, "position_ids": positions, "use_cache": False},
        ):
            assert model(ids, **said).logits.shape == (2, LENGTH, 61)


@pytest.mark.cuda
def test_a_cuda_graph_of_a_model_replays_with_other_data() -> None:
    model = apply(build("Llama").cuda(), SMALL)
    ids, positions = tokens(2).cuda(), torch.arange(LENGTH, device="cuda")[None]
    call: dict[str, Any] = {"position_ids": positions, "use_cache": False}
    with torch.no_grad():
        for _ in range(3):  # compile kernels, fill caches
            model(ids, **call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(ids, **call).logits
        ids.copy_(ids.flip(1))
        graph.replay()
        torch.testing.assert_close(out, model(ids, **call).logits)


# Compiled.


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.parametrize("side", [None, *PADS])
def test_a_padded_batch_compiles_into_one_graph(side: str | None) -> None:
    model, ids = model_of("Llama"), tokens(4)
    mask = mask_of(PADS[side] if side else [(0, 0)] * 4)
    got = compiled(model)(ids, attention_mask=mask, use_cache=False).logits
    want = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)


def test_packed_documents_compile_into_one_graph() -> None:
    model = model_of("Llama")
    _, ids, positions = documents()
    starts = torch.tensor([0, 20, 21, 45, 54, 90], dtype=torch.int32)
    got = compiled(model)(
        ids.view(1, -1),
        position_ids=positions.view(1, -1),
        cu_seq_lens_q=starts,
        cu_seq_lens_k=starts,
        use_cache=False,
    ).logits
    want = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got.view(want.shape), want, **CLOSE)


def test_a_compiled_model_still_refuses() -> None:
    model = compiled(apply(build("Llama"), SMALL))
    holes = torch.ones_like(tokens())
    holes[0, 3:6] = 0
    with pytest.raises(RuntimeError, match="attention_mask must hold one run of ones a row"):
        model(tokens(), attention_mask=holes, use_cache=False)
    _, ids, positions = documents()
    message = "position_ids must hold one document a row in a compiled model, got packed"
    with pytest.raises(RuntimeError, match=message):
        model(ids, position_ids=positions, use_cache=False)


# Generation.


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("top_k", [2, 20])
def test_generates_from_a_left_padded_batch(name: str, top_k: int) -> None:
    model = model_of(name, MoBAConfig(8, top_k, cached="dense"))
    ids, mask = tokens(3), mask_of(PADS["left"][:3])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    calls: list[Any] = []
    with observe(lambda *call: calls.append(call)):
        got = model.generate(ids, attention_mask=mask, **options)
    assert len(calls) == 3  # the prefill alone, in each layer
    assert torch.equal(calls[0][6]["key_mask"], mask.bool())
    for row in range(3):
        alone = ids[row : row + 1, mask[row].bool()]
        want = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(got[row, LENGTH:], want[0, alone.shape[1] :])


# Soft caps, sinks and windows.


@pytest.mark.parametrize("layers", [FULL, WINDOWS])
@pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
def test_is_eager_attention_if_everything_is_attended_to(name: str, layers: list[str]) -> None:
    """Also in layers with a window, left as they are, and in cached calls."""
    mask = mask_of(PADS["left"][:3])
    results = []
    for routed in (False, True):
        model = drawn(name, layer_types=layers, sliding_window=9)
        windows = tuple(i for i, kind in enumerate(layers) if kind != "full_attention")
        # Eager masks in float64 with a number that is infinite in its softmax, float32.
        model.float().set_attn_implementation("eager")
        if routed:
            apply(model, MoBAConfig(8, 6, dense_layers=windows, cached="dense"))
        first = model(tokens(3)[:, :-5], attention_mask=mask[:, :-5])
        cache = first.past_key_values
        second = model(tokens(3)[:, -5:], attention_mask=mask, past_key_values=cache)
        mean = second.logits.mean()
        grads = torch.autograd.grad(mean, list(model.parameters()))
        real = first.logits[mask[:, :-5].bool()]
        results.append([real, second.logits, *grads])
    for got, want in zip(*reversed(results), strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
def test_packed_windows_stay_apart(name: str) -> None:
    config = MoBAConfig(8, 2, dense_layers=(0, 2))
    model = model_of(name, config, layer_types=WINDOWS, sliding_window=9)
    parts, ids, positions = documents()
    want = torch.cat([model(part[None]).logits[0] for part in parts])
    got = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got.flatten(0, 1), want, **CLOSE)
    starts = torch.tensor([0, 20, 21, 45, 54, 90], dtype=torch.int32)
    row: dict[str, Any] = {"position_ids": positions.view(1, -1), "use_cache": False}
    got = model(ids.view(1, -1), cu_seq_lens_q=starts, cu_seq_lens_k=starts, **row).logits[0]
    torch.testing.assert_close(got, want, **CLOSE)


def test_sinks_take_their_share() -> None:
    model = model_of("GptOss", ALL)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e9)
    nothing = model(tokens()).logits
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(3.0)
    assert (model(tokens()).logits - nothing).abs().max() > 0.1


# top_k by layer and head.


def test_each_head_of_each_layer_has_its_own_top_k() -> None:
    rows = ((1, 3, 2, 6), (2, 2, 2, 2), (6, 6, 6, 1))
    model = model_of("Llama", MoBAConfig(8, 6, head_top_k=rows))
    found = []
    for number, layer in enumerate(model.model.layers):
        heads: list[Tensor] = []
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, call, heads=heads: heads.append(call[0].unflatten(-1, (4, 8)))
        )
        found.append((number, heads))
    model(tokens())
    for number, heads in found:
        mixed = heads[0]
        for head, top_k in enumerate(rows[number]):
            # Those of earlier layers are as they were: this layer alone attends otherwise.
            same = list(rows)
            same[number] = (top_k,) * 4
            apply(model, MoBAConfig(8, 6, head_top_k=tuple(same)))
            heads.clear()
            model(tokens())
            torch.testing.assert_close(heads[0][:, :, head], mixed[:, :, head], **CLOSE)


# What is refused.


def test_refuses_holes_in_a_mask() -> None:
    mask = torch.ones_like(tokens())
    mask[1, 5:7] = 0
    message = "attention_mask must hold one run of ones a row, got several: pad on the left"
    with pytest.raises(ValueError, match=message):
        apply(build("Llama"), SMALL)(tokens(), attention_mask=mask)


def test_refuses_documents_that_it_cannot_place() -> None:
    model = apply(build("Llama"), SMALL)
    starts = torch.tensor([0, 20, LENGTH], dtype=torch.int32)
    both: dict[str, Any] = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    with pytest.raises(ValueError, match="must come with a batch of 1, got 2 rows: flatten them"):
        model(tokens(), **both)
    with pytest.raises(TypeError, match="must be Tensors, got Tensor and NoneType"):
        model(tokens(1), cu_seq_lens_q=starts)
    mask = mask_of([(3, 0)])
    with pytest.raises(ValueError, match="attention_mask must be None or all ones beside cu_seq"):
        model(tokens(1), attention_mask=mask, **both)
    apply(model, MoBAConfig(8, 2, cached="dense"))
    cache = model(tokens(1)).past_key_values
    with pytest.raises(ValueError, match="must come with as many queries as keys, got 45 queries"):
        model(tokens(1), past_key_values=cache, **both)


def test_refuses_masks_of_numbers_beside_a_soft_cap() -> None:
    model = model_of("Gemma2", MoBAConfig(8, 2, dense_layers=(0, 1, 2)))
    mask = torch.zeros(2, 1, LENGTH, LENGTH).double()
    with pytest.raises(TypeError, match="attention_mask must be bool for a layer with a soft cap"):
        model(tokens(), attention_mask=mask)


def test_refuses_top_k_of_other_layers_or_heads() -> None:
    for rows in (((2, 2, 2, 2),) * 2, ((2, 2),) * 3):
        with pytest.raises(ValueError, match="head_top_k must hold 4 numbers, one for each head"):
            apply(build("Llama"), MoBAConfig(8, 2, head_top_k=rows))


@pytest.mark.slow
def test_a_padded_batch_of_smollm2_is_its_rows() -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    try:
        pretrained.fetch()
    except OSError as error:
        pytest.skip(f"no model: {error}")
    model, tokenizer = pretrained.load(dtype=torch.float32)
    apply(model, MoBAConfig(block_size=16, top_k=3))
    prompts = ["The capital of France is", "Once upon a time, " * 20, "def f(x):\n    return " * 9]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        got = model(**batch).logits
        for row, real in enumerate(batch["attention_mask"].bool()):
            alone = model(batch["input_ids"][row : row + 1, real]).logits[0]
            assert (got[row, real] - alone).norm() < 1e-4 * alone.norm()
            assert torch.equal(got[row, -1].argmax(), alone[-1].argmax())
