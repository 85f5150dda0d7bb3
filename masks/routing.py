"""What a routing is: which blocks every query attends to, and where they lie."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.masks.blocks import ceil_div
from moba_flex.masks.layout import Tables, plain_tables


@dataclass(frozen=True)
class Routing:
    """The blocks that every query chose, and the geometry that gives them meaning.

    What a query chose is a *set* of blocks. Its own block belongs to the set, listed or not.
    Entries that repeat, blocks that the query may not see (of the future, if causal, or of another
    document) and numbers out of range, such as -1, add nothing to it.

    Without tables queries are the last `q_len` of `kv_len` positions, and the own block of query
    `i` is number `(q_offset + i) // block_size`.

    Attributes:
        blocks: The chosen blocks, integers `[B, Hq, Q, K]`, in any order; or `[B, Hkv, Q, K]`, if
            the query heads of a key/value head choose alike. The library's own gates list the
            other blocks alone, `K - 1` of them, as int32, ascending, `num_blocks` for none.
        block_size: Keys per block.
        q_len: Number of queries.
        kv_len: Number of keys.
        causal: Whether a query sees only keys at its position and before.
        tables: Where blocks lie, and which a query may see, if rows are packed documents or are
            padded; None for one sequence a row.
    """

    blocks: Tensor
    block_size: int
    q_len: int
    kv_len: int
    causal: bool
    tables: Tables | None = None

    @property
    def num_blocks(self) -> int:
        """Number of key blocks, `N`."""
        if self.tables is not None:
            return self.tables.num_blocks
        return ceil_div(self.kv_len, self.block_size)

    @property
    def places(self) -> Tables:
        """Where blocks lie, and which a query may see, also if rows are one sequence each."""
        return self.tables or plain_tables(
            self.q_len, self.kv_len, self.block_size, self.causal, self.blocks.device
        )

    @property
    def located(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The tensors of `tables`, as ops take them."""
        return (None, None) if self.tables is None else (self.tables.queries, self.tables.extents)

    @classmethod
    def of_parts(
        cls,
        q: Tensor,
        k: Tensor,
        blocks: Tensor,
        block_size: int,
        causal: bool,
        queries: Tensor | None,
        extents: Tensor | None,
    ) -> "Routing":
        """Put together what an op, which takes tensors and numbers alone, got one by one."""
        q_len, kv_len = q.shape[2], k.shape[2]
        tables = Tables.of_parts(queries, extents, block_size, causal, kv_len)
        return cls(blocks, block_size, q_len, kv_len, causal, tables)

    @property
    def q_offset(self) -> int:
        """Position of the first query."""
        return self.kv_len - self.q_len

    def as_set(self, num_heads: int | None = None) -> "Routing":
        """Return the same choice in the form that the library's own gates give it.

        Args:
            num_heads: Number of query heads, `Hq`; if None, that of `blocks`.
        """
        blocks, none = self.blocks, self.num_blocks
        if blocks.dtype not in (torch.int32, torch.int64):
            blocks = blocks.long()
        _, own, oldest, newest = self.places.queries[:, :, None, :, None]
        # Compared before they are cast to int32, which would wrap large numbers around.
        chosen = (blocks >= oldest) & (blocks <= newest) & (blocks != own)
        blocks = torch.where(chosen, blocks, none).int().sort(dim=3).values
        again = F.pad(blocks[..., 1:] == blocks[..., :-1], (1, 0))
        blocks = blocks.masked_fill(again, none).sort(dim=3).values
        most = ceil_div(self.kv_len, self.block_size)
        if isinstance(most, int):  # else nobody knows yet how many blocks there are
            blocks = blocks[..., : max(most - 1, 0)]
        if num_heads is not None and num_heads != blocks.shape[1]:
            blocks = blocks.repeat_interleave(num_heads // blocks.shape[1], dim=1)
        return Routing(blocks, self.block_size, self.q_len, self.kv_len, self.causal, self.tables)
