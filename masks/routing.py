"""What a routing is: which blocks every query attends to, and where they lie."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.masks.layout import Layout, ceil_div


@dataclass(frozen=True)
class Routing:
    """The blocks that every query chose, and the layout that gives their numbers a meaning.

    The choice of a query is a *set* of blocks. Its own block belongs to the set, listed or not.
    Entries that repeat, blocks that the query may not see (of the future, if causal, or of another
    document) and numbers out of range, such as -1, add nothing to it.

    Four tokens in blocks of 2, of which token 2 chose block 0, and what `blocks` may hold:

        token             0     1     2     3
        own block         0     0     1     1
        blocks          [-1]  [-1]  [ 0]  [ 1]
        attends to      {0}   {0}  {0,1}  {1}

    Example:
        >>> blocks = torch.tensor([-1, -1, 0, 1]).view(1, 1, 4, 1)
        >>> routing = Routing(blocks, block_size=2, q_len=4, kv_len=4, causal=True)
        >>> routing.as_set().blocks.flatten().tolist()  # 2 blocks: number 2 stands for none
        [2, 2, 0, 2]

    Attributes:
        blocks: The chosen blocks, integers `[B, Hq, Q, K]`, in any order; or `[B, Hkv, Q, K]`, if
            the query heads of a key/value head choose alike. The library's own gates list only the
            other blocks, `K - 1` of them, as int32, ascending, with `num_blocks` for none.
        block_size: Keys per block.
        q_len: Number of queries.
        kv_len: Number of keys. Queries are the last of these positions, if rows are plain.
        causal: Whether a query sees only keys at its position and before.
        tables: The layout of packed documents or of padded rows, as of `moba_flex.make_tables`;
            None if each row is one sequence.
    """

    blocks: Tensor
    block_size: int
    q_len: int
    kv_len: int
    causal: bool
    tables: Layout | None = None

    @classmethod
    def over(cls, layout: Layout, blocks: Tensor) -> "Routing":
        """Return the choice of `blocks` of a layout."""
        tables = None if layout.extents is None else layout
        return cls(blocks, layout.block_size, layout.q_len, layout.kv_len, layout.causal, tables)

    @property
    def layout(self) -> Layout:
        """Where queries and blocks lie."""
        return self.tables or Layout(self.q_len, self.kv_len, self.block_size, self.causal)

    @property
    def num_blocks(self) -> int:
        """Number of key blocks, `N`."""
        if self.tables is not None:
            return self.tables.num_blocks
        return ceil_div(self.kv_len, self.block_size)

    @property
    def q_offset(self) -> int:
        """Position of the first query, if rows are plain."""
        return self.kv_len - self.q_len

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None, int, bool]:
        """The routing as ops take it, which know tensors and numbers alone."""
        tables = self.tables
        place = (None, None) if tables is None else (tables.queries, tables.extents)
        return self.blocks, *place, self.block_size, self.causal

    def as_set(self, num_heads: int | None = None) -> "Routing":
        """Return the same choice in the form that the library's own gates give it.

        Args:
            num_heads: Number of query heads, `Hq`; if None, that of `blocks`.
        """
        blocks, none = self.blocks, self.num_blocks
        if blocks.dtype not in (torch.int32, torch.int64):
            blocks = blocks.long()
        at = self.layout.coordinates(blocks.device)
        own, oldest, newest = (x[:, None, :, None] for x in (at.own, at.oldest, at.newest))
        # Compared before they are cast to int32, which would wrap large numbers around.
        chosen = (blocks >= oldest) & (blocks <= newest) & (blocks != own)
        blocks = torch.where(chosen, blocks, none).int().sort(dim=3).values
        again = F.pad(blocks[..., 1:] == blocks[..., :-1], (1, 0))
        blocks = blocks.masked_fill(again, none).sort(dim=3).values
        most = ceil_div(self.kv_len, self.block_size)
        if isinstance(most, int):  # else nobody knows yet how many blocks there are
            blocks = blocks[..., : max(most - 1, 0)]
        routing = Routing.over(self.layout, blocks)
        return routing if num_heads is None else routing.for_heads(num_heads)

    def for_heads(self, num_heads: int) -> "Routing":
        """Return the same choice with a list for each of `Hq` query heads."""
        group = num_heads // self.blocks.shape[1]
        if group == 1:
            return self
        return Routing.over(self.layout, self.blocks.repeat_interleave(group, dim=1))
