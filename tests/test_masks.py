"""Regrouped order and block masks, entry by entry, against the oracle's choice of tokens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from moba_flex import create_moba_block_mask, moba_attention_reference, route
from moba_flex.compile.merge import gather_rows
from moba_flex.masks import regroup_kernel
from moba_flex.masks.block_mask import routing_to_block_mask
from moba_flex.masks.layout import make_tables
from moba_flex.masks.regroup import regroup, sort_pairs, tile_blocks
from moba_flex.masks.regroup_kernel import sort_pairs_triton, tile_blocks_triton
from moba_flex.masks.routing import Routing
from moba_flex.masks.tiles import (
    TILE,
    lay_out_keys,
    own_block_mask,
    regrouped_origin,
    routed_block_mask,
)
from tests.helpers import (
    Case,
    cases,
    chosen_blocks,
    layouts,
    listed_tiles,
    needs_interpreter,
    route_case,
    token_mask,
    visited_pairs,
)


@given(case=layouts())
def test_natural_mask_visits_what_was_chosen(case: Case) -> None:
    q, k, _ = case.inputs()
    routing = route_case(case, q, k)
    mask = routing_to_block_mask(routing)
    wanted = token_mask(chosen_blocks(routing), case)
    assert torch.equal(visited_pairs(mask), wanted)

    if case.docs is None and case.pads is None:
        assert torch.equal(create_moba_block_mask(q, k, **case.gate).kv_indices, mask.kv_indices)
    partial, full = listed_tiles(mask)
    spread = wanted.new_zeros(
        *wanted.shape[:2], full.shape[2] * TILE, full.shape[3] * mask.BLOCK_SIZE[1]
    )
    spread[:, :, : case.q_len, : case.kv_len] = wanted
    tiles = spread.unflatten(3, (-1, mask.BLOCK_SIZE[1])).unflatten(2, (-1, TILE))
    assert torch.equal(partial | full, tiles.any(5).any(3)), "no tile is computed in vain"
    rows = torch.arange(full.shape[2] * TILE).view(-1, TILE) < case.q_len
    whole = (tiles.all(5) | ~rows[None, None, :, :, None]).all(3)
    assert torch.equal(full, whole), "what needs no mask is listed as full"


def test_to_dense_covers_the_tiles_of_the_oracle() -> None:
    case = Case(2, 2, 2, q_len=700, kv_len=900, block_size=100, top_k=3)
    q, k, v = case.inputs()
    mask = create_moba_block_mask(q, k, **case.gate)
    wanted = token_mask(moba_attention_reference(q, k, v, **case.gate).blocks, case)
    padded = wanted.new_zeros(2, 4, 768, 1024)
    padded[:, :, :700, :900] = wanted
    tiles = padded.unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).any(5).any(3)
    assert torch.equal(mask.to_dense().bool(), tiles)
    assert mask.shape == (2, 4, 700, 900)


def test_mask_blocks_are_routed_blocks_where_they_fit() -> None:
    q = torch.randn(1, 1, 1024, 16)
    assert create_moba_block_mask(q, q, block_size=512, top_k=2).BLOCK_SIZE == (128, 512)
    assert create_moba_block_mask(q, q, block_size=96, top_k=2).BLOCK_SIZE == (128, 128)
    # A short last mask block of more than 128 keys would be read past the end of the keys.
    short = q[:, :, :896]
    assert create_moba_block_mask(short, short, block_size=512, top_k=2).BLOCK_SIZE == (128, 128)


@given(case=cases(), tile=st.integers(1, 300))
def test_pairs_are_sorted_by_block_and_cut_into_tiles(case: Case, tile: int) -> None:
    q, k, _ = case.inputs()
    routing = route(q, k, **case.gate)
    pairs = sort_pairs(routing, case.num_kv_heads)
    chosen = routing.blocks.reshape(pairs.rank.shape)
    exists = chosen < routing.num_blocks
    assert torch.equal(pairs.rank >= 0, exists)
    assert pairs.first.dtype == pairs.row.dtype == pairs.rank.dtype == torch.int32
    lists = [(b, h) for b in range(case.batch) for h in range(case.num_kv_heads)]
    tables = {skip: tile_blocks(pairs.first, pairs.row.shape[2], tile, skip) for skip in (0, 1)}
    for number, (b, h) in enumerate(lists):
        row, pick = exists[b, h].nonzero(as_tuple=True)
        rank = pairs.rank[b, h, row, pick].long()
        assert torch.equal(pairs.row[b, h, rank].long(), row)
        expected: dict[int, list[int]] = {skip: [] for skip in tables}
        for block in range(routing.num_blocks):
            first, stop = pairs.first[b, h, block : block + 2].tolist()
            mine = rank[chosen[b, h, row, pick] == block]
            assert torch.equal(mine.sort().values, torch.arange(first, stop))
            assert (pairs.row[b, h, first:stop].diff() > 0).all(), "rows ascend within a block"
            for skip, (_, first_tile) in tables.items():
                assert first_tile[number, block] == len(expected[skip])
                expected[skip] += [block] * max(0, -(-len(mine) // tile) - skip)
        for skip, (tile_block, first_tile) in tables.items():
            found, used = tile_block[number].tolist(), len(expected[skip])
            assert first_tile[number, -1] == used
            assert found[:used] == expected[skip]
            assert set(found[used:]) <= {routing.num_blocks}


def assert_kernels_sort_alike(routing: Routing, num_kv_heads: int, tile: int) -> None:
    """Compare the kernels with the operations on CPU: interpreted, or for real on a GPU."""
    on_cpu = replace(routing, blocks=routing.blocks.cpu())
    expected = sort_pairs(on_cpu, num_kv_heads)
    if routing.blocks.shape[3] == 0:
        return
    found = sort_pairs_triton(routing.blocks, num_kv_heads, routing.num_blocks)
    for x, y in zip(found, (expected.row, expected.rank, expected.first), strict=True):
        assert torch.equal(x.cpu(), y)
    for skip in (0, 1):
        tables = tile_blocks(expected.first, expected.row.shape[2], tile, skip)
        most = tables[0].shape[1]
        for x, y in zip(tile_blocks_triton(found[2], tile, skip, most), tables, strict=True):
            assert torch.equal(x.cpu(), y)


@pytest.mark.usefixtures("poison")
@settings(max_examples=settings().max_examples // 3 + 1)
@given(case=cases(max_len=300), tile=st.integers(1, 200), per_tile=st.integers(1, 40))
def test_kernels_sort_alike(case: Case, tile: int, per_tile: int) -> None:
    needs_interpreter()
    q, k, _ = case.inputs()
    with pytest.MonkeyPatch.context() as patch:  # chunks of many tiles and of few
        patch.setattr(regroup_kernel, "_BLOCKS_PER_TILE", per_tile)
        assert_kernels_sort_alike(route(q, k, **case.gate), case.num_kv_heads, tile)


@given(case=cases())
def test_regrouping_is_a_permutation_into_tiles_of_one_block(case: Case) -> None:
    q, k, _ = case.inputs()
    routing = route(q, k, **case.gate)
    if routing.blocks.shape[3] == 0:
        return
    for tile in (1, TILE):
        groups = regroup(routing, case.num_kv_heads, tile)
        rows = routing.blocks.reshape(case.batch, case.num_kv_heads, -1, routing.blocks.shape[3])
        exists = rows < routing.num_blocks
        assert torch.equal(groups.slot >= 0, exists)
        b, h, r, c = exists.nonzero(as_tuple=True)
        slot = groups.slot[b, h, r, c].long()
        assert torch.equal(groups.row[b, h, slot].long(), r), "the slot of a pair holds its row"
        assert (groups.row >= 0).sum() == len(b), "and no other slot holds one"
        assert torch.equal(groups.tile_block[b, h, slot // tile], rows[b, h, r, c])
        assert groups.tile_used[b, h, slot // tile].all()
        assert groups.num_tiles.sum() == groups.tile_used.sum()
        for block in range(routing.num_blocks):
            number = (rows == block).flatten(2).sum(2)
            assert torch.equal(groups.num_tiles[..., block].long(), -(-number // tile))


@pytest.mark.parametrize("num_blocks", [2**15 - 2, 2**15 - 1, 2**15])
def test_regrouping_of_as_many_blocks_as_short_keys_can_number(num_blocks: int) -> None:
    blocks = torch.randint(num_blocks, (1, 2, 300, 3)).int()
    blocks[..., -1] = num_blocks  # none
    groups = regroup(Routing(blocks, 1, 300, num_blocks, False), 2, TILE)
    assert (groups.slot[..., -1] == -1).all()
    slot = groups.slot[..., :-1].flatten(2).long()
    rows = torch.arange(300, dtype=torch.int32).repeat_interleave(2).expand(1, 2, -1)
    assert torch.equal(groups.row.gather(2, slot), rows)
    assert torch.equal(groups.tile_block.gather(2, slot // TILE), blocks[..., :-1].flatten(2))


def test_regrouping_has_room_for_one_popular_block() -> None:
    q, k = torch.ones(1, 4, 1000, 16), torch.zeros(1, 2, 1000, 16)
    k[:, :, 100:200] = 1.0  # every query likes block 1 best
    routing = route(q, k, block_size=100, top_k=2)
    first = sort_pairs(routing, 2).first[0, 0]
    assert first.diff().tolist() == [200, 1600, 0, 0, 0, 0, 0, 0, 0, 0]
    groups = regroup(routing, 2, TILE)
    # 1800 pairs in 2 + 13 tiles of the list's 26.
    assert groups.tile_used.sum(2).tolist() == [[15, 15]]
    assert groups.row.shape[2] == 26 * TILE


@example(case=Case(block_size=20, top_k=2, docs=(300,) * 5, q_docs=(2,) * 5))  # far apart
@example(case=Case(1, 1, 1, 1100, 1100, block_size=1, pads=((1000, 10),)))  # tiles of padding
@example(case=Case(1, 1, 1, 1100, 1100, block_size=1, pads=((10, 1000),)))
@given(case=layouts(max_len=1500, groups=(1,)))
def test_own_masks_visit_own_blocks(case: Case) -> None:
    blocks = torch.empty(case.batch, case.num_heads, case.q_len, 0, dtype=torch.int32)
    tables = make_tables(case.q_len, case.kv_len, case.block_size, case.causal, **case.layout)
    routing = Routing(blocks, case.block_size, case.q_len, case.kv_len, case.causal, tables)
    wanted = token_mask(chosen_blocks(routing), case)[:, :1]
    assert torch.equal(visited_pairs(own_block_mask(routing), case.batch), wanted)
    masked = visited_pairs(own_block_mask(routing, lambda b, h, i, j: (i + j) % 3 < b), case.batch)
    i, j = torch.arange(case.q_len)[:, None], torch.arange(case.kv_len)
    assert torch.equal(
        masked, wanted & ((i + j) % 3 < torch.arange(case.batch)[:, None, None, None])
    )


@example(case=Case(2, 2, 1, 129, 300, block_size=128, top_k=2))  # keys lie as they are
@given(case=layouts(max_len=300, min_block=20, groups=(1, 3)))
def test_routed_masks_visit_chosen_blocks(case: Case) -> None:
    q, k, _ = case.inputs()
    routing = route_case(case, q, k)
    none = replace(routing, blocks=routing.blocks[..., :0])
    if routing.blocks.shape[3] == 0:
        return

    layout, laid_out = lay_out_keys(routing)
    place = torch.arange(layout.length)
    groups = regroup(laid_out, case.num_kv_heads, TILE)
    rows = groups.row.clamp(min=0).long()
    head, q_idx = rows // case.q_len, rows % case.q_len
    b = torch.arange(case.batch)[:, None]
    key, exists = layout.key_of(b, place.expand(case.batch, -1))
    if (places := layout.places_of(k)) is not None:
        assert torch.equal(gather_rows(k, *places)[:, 0][exists], k[b, 0, key][exists])
        assert not gather_rows(k, *places)[:, 0][~exists].any()
    # Each slot sees the keys of one block, and all slots of a query all that it chose.
    routed = visited_pairs(routed_block_mask(groups, layout))
    assert not (routed & ~exists[:, None, None]).any()
    seen = torch.zeros(case.batch, case.num_heads, case.q_len, case.kv_len, dtype=torch.int32)
    kv_head = torch.arange(case.num_kv_heads)[:, None]
    b, h = b[..., None, None], (kv_head * case.group + head)[..., None]
    used = routed & (groups.row >= 0)[..., None]
    seen.index_put_((b, h, q_idx[..., None], key[:, None, None]), used.int(), accumulate=True)
    chosen = token_mask(chosen_blocks(routing), case) & ~token_mask(chosen_blocks(none), case)
    assert torch.equal(seen, chosen.int())
    origin = regrouped_origin(groups, layout, case.q_len, case.group)
    slot = torch.arange(rows.shape[2])[:, None]
    found = origin(b, kv_head[..., None], slot, place)
    for x, y in zip(found[1:], (h, q_idx[..., None], key[:, None, None]), strict=True):
        assert torch.equal(*torch.broadcast_tensors(x, y))


def test_short_documents_take_no_room() -> None:
    docs = 5000
    tables = make_tables(
        64 * docs, 64 * docs, 128, True, cu_seqlens=torch.arange(docs + 1).int() * 64
    )
    assert tables is not None
    blocks = torch.full((1, 1, 64 * docs, 2), tables.num_blocks, dtype=torch.int32)
    layout, _ = lay_out_keys(Routing(blocks, 128, 64 * docs, 64 * docs, True, tables))
    assert layout.length <= 64 * docs + 128


def own_mask(length: int) -> BlockMask:
    blocks = torch.empty(1, 1, length, 0, dtype=torch.int32)
    return own_block_mask(Routing(blocks, 512, length, length, True))


def test_own_masks_list_whole_tiles_as_full() -> None:
    partial, full = listed_tiles(own_mask(1024))
    tile = torch.eye(4).repeat_interleave(1, 0).bool()
    assert torch.equal(partial[0, 0], torch.block_diag(tile, tile).bool())
    below = torch.ones(4, 4).tril(-1)
    assert torch.equal(full[0, 0], torch.block_diag(below, below).bool())


def test_own_masks_need_no_table_of_tiles_by_tiles() -> None:
    length = 1 << 18
    mask = own_mask(length)
    assert mask.kv_indices.shape == (1, 1, length // TILE, 6)
    assert mask.q_indices is not None
    assert mask.q_indices.shape == (1, 1, length // TILE, 6)


@torch.no_grad()
@pytest.mark.slow
def test_anybodys_flex_attention_takes_the_mask_and_a_score_mod() -> None:
    case = Case(1, 2, 2, q_len=200, kv_len=300, block_size=40, top_k=3)
    q, k, v = case.inputs()
    blocks = moba_attention_reference(q, k, v, **case.gate).blocks
    position = torch.arange(100, 300)[:, None] - torch.arange(300)
    scores = q @ k.repeat_interleave(2, 1).mT / 4 - 0.1 * position
    scores = scores.masked_fill(~token_mask(blocks, case), -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)

    def nearer(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return score - 0.1 * (q_idx + 100 - kv_idx)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = create_moba_block_mask(q, k, **case.gate)
        out = flex_attention(q, k, v, score_mod=nearer, block_mask=mask, enable_gqa=True)
        assert isinstance(out, torch.Tensor)
        return out

    inside = torch.compile(attend, fullgraph=True)(q, k, v)
    torch.testing.assert_close(inside, expected)
    outside = torch.compile(flex_attention)(
        q,
        k,
        v,
        score_mod=nearer,
        block_mask=create_moba_block_mask(q, k, **case.gate),
        enable_gqa=True,
    )
    torch.testing.assert_close(outside, expected)
