"""A cache of keys and values that keeps the gate's block keys, and attention to it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Required, Self, Unpack, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest
from typing_extensions import override  # of typing from Python 3.12 on

from moba_flex.attention import Plan, attend, attend_by
from moba_flex.compile.plans import find_plan
from moba_flex.masks._torch.exporting import is_exporting, is_traced
from moba_flex.masks._torch.inputs import cast_by_autocast
from moba_flex.masks.append import append, count_programs, require_pages
from moba_flex.masks.checks import check_int, is_seen
from moba_flex.masks.layout import LONGEST, NewKeys, Pages, Slots, ceil_div
from moba_flex.masks.mods import MaskMod, ScoreMod
from moba_flex.masks.request import Request, ScoreOptions, cached_request

_ROOM = 256  # free slots of a new cache that grows
_FEW = 64  # queries


class BlockCache:
    """Keys, values and block keys of one attention layer, for a batch of rows.

    A row is one sequence, and rows may have different lengths. Its keys lie in *slots*, from
    `start` to `stop`; other slots may hold anything and are never read. Blocks are counted from
    `start`.

    A cache without `max_len` grows; then lengths must be known to the host. One with `max_len` is
    allocated once and is only written in place, so that CUDA graphs and compiled graphs can hold
    it: lengths are tensors, which no method reads.

    Attributes:
        block_size: Keys per block.
        max_len: Number of slots, if the cache does not grow.
        start: Slot of each row's first key, int32 `[B]`; `B` is 0 until the first append.
        stop: The slot after each row's last key, int32 `[B]`.

    Raises:
        TypeError: A length is no int.
        ValueError: A length is less than 1.

    Example:
        >>> cache = BlockCache(block_size=16)
        >>> cache.append(torch.randn(1, 2, 100, 32), torch.randn(1, 2, 100, 32))
        >>> cache.append(torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 32))
        >>> out = cached_attention(torch.randn(1, 4, 1, 32), cache, top_k=3)
        >>> out.shape, cache.stop.tolist()
        (torch.Size([1, 4, 1, 32]), [101])
    """

    _memory: "_Memory | None" = None
    _table: Tensor | None = None

    def __init__(self, block_size: int, max_len: int | None = None) -> None:
        self.block_size = check_int("block_size", block_size, 1)
        self.max_len = None if max_len is None else check_int("max_len", max_len, 1)
        with _normal():
            self.start = torch.zeros(0, dtype=torch.int32, device="cpu")
            self.stop = torch.zeros_like(self.start)
        self._longest = 0  # of a cache that grows: no row has a key behind this slot
        self._even = True  # all rows have as many keys, and none has padding
        self._counters: Tensor | None = None
        self._counts: Tensor | None = None  # of the last append
        self._num_new = 0

    def append(
        self, k: Tensor, v: Tensor, *, counts: Tensor | None = None, start: Tensor | None = None
    ) -> None:
        """Add keys and values behind those of each row.

        Args:
            k: Keys, `[B, Hkv, T, D]`.
            v: Values, `[B, Hkv, T, Dv]`.
            counts: How many of the `T` each row takes, the first ones, int `[B]`; None for all.
            start: Slot of each row's first key, int `[B]`, for rows that are padded on the left.
                Only rows that have no key yet may change theirs.

        Raises:
            TypeError: A tensor has the wrong dtype.
            ValueError: Shapes do not fit the cache, a number is out of range, a row would get more
                than `max_len` keys, or a gradient is wanted, which a cache does not hand on. Then
                the cache is as it was.
        """
        with self.restoring():
            self._append(self._begin(k, v, counts=counts, start=start))

    def _begin(
        self, k: Tensor, v: Tensor, *, counts: Tensor | None = None, start: Tensor | None = None
    ) -> NewKeys:
        """Check what `append` takes and make room for it, but append nothing yet."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError(
                "k and v must need no gradients in a cache, got some that do: use "
                "torch.no_grad(), or call moba_attention with all keys"
            )
        if is_exporting():
            raise ValueError(
                "cache must be used in eager or compiled code, got torch.export: a package holds "
                "no cache"
            )
        self.allocate(k, v)
        memory, num_new = self._filled(), k.shape[2]
        if counts is not None:
            self._even = False
            # A copy, since the caller may change it, and `append` changes `stop`.
            counts = _row_numbers("counts", counts, self.stop, num_new).clone()
        taken = num_new if counts is None else counts
        if start is not None:
            start = _row_numbers("start", start, self.stop, LONGEST)
            if is_seen(start) and bool(((start != self.start) & (self.start < self.stop)).any()):
                raise ValueError(
                    "start must stay as it is for rows that have keys, got another: reset the "
                    "cache first"
                )
        if self.max_len is None:
            memory = self._memory = memory.with_room(self._longest + num_new, self.block_size)
        elif is_traced() or not k.is_cuda:  # else the kernel requires it
            self._require_room(self.stop + taken)
        if start is not None:
            self.start_at(start)
        return NewKeys(k, v, counts, memory.sums)

    def _append(self, new: NewKeys) -> None:
        """Append what `_begin` returned."""
        rows, given = (self.start, self.stop, self.counters), (new.keys, new.values)
        memory = self._filled().tensors
        append(*memory, *given, *rows, new.counts, self._table, self.block_size)
        self._end(new)

    def restoring(self) -> AbstractContextManager[None]:
        """Return a context that leaves the cache as it was if its body raises.

        Slots that hold no key may change. On CUDA, so may the contents of `start` and `stop`, for
        a copy of them is one more launch in each step.
        """
        return nullcontext() if is_traced() else self._restoring(contents=not self.stop.is_cuda)

    @contextmanager
    def _restoring(self, *, contents: bool) -> Iterator[None]:
        """Restore attributes if the body raises, and, if asked, contents of `start` and `stop`."""
        attributes, memory, rows = vars(self).copy(), self._memory, (self.start, self.stop)
        copies = [x.clone() for x in rows] if contents else []
        try:
            yield
        except BaseException:  # an interrupt, too
            for row, copy in zip(rows, copies, strict=False):
                row.copy_(copy)
            vars(self).update(attributes)
            self._memory = memory
            raise

    def _end(self, new: NewKeys) -> None:
        """Note that what `_begin` returned has been appended."""
        self._counts, self._num_new = new.counts, new.keys.shape[2]
        if self.max_len is None:
            self._longest += self._num_new

    def start_at(self, start: Tensor) -> None:
        """Let rows that have no key yet start at these slots, int `[B]`; others stay.

        Raises:
            ValueError: No memory has been allocated.
        """
        self._filled()
        self._even = False
        start = start.to(self.start.device)
        self.start.copy_(start.where(self.stop <= self.start, self.start))

    def crop(self, tokens: int | Tensor) -> None:
        """Take back the last keys of each row, as after rejected guesses.

        Args:
            tokens: How many, padding on the left included: one number, or one for each row, int
                `[B]`.

        Raises:
            TypeError: It is no integer.
            ValueError: A row has fewer, or a number is negative.
        """
        if not isinstance(tokens, Tensor):
            tokens = check_int("tokens", tokens, 0)
            if self._memory is None and tokens == 0:
                return
        self._filled()
        with self.restoring():
            if isinstance(tokens, Tensor):
                self._even = False
                tokens = _row_numbers("tokens", tokens, self.stop, LONGEST)
            enough = self.stop >= tokens
            if is_seen(enough) and not bool(enough.all()):
                raise ValueError(f"tokens must be at most the slots of a row, got {tokens}")
            self._counts = None
            self.stop.sub_(tokens)
            if self.max_len is None and isinstance(tokens, int):
                self._longest -= tokens

    def select(self, rows: Tensor) -> None:
        """Make row `i` a copy of row `rows[i]`, int `[B']`: for beams, or to drop finished rows.

        A cache with `max_len` keeps its memory if the number of rows stays the same.

        Raises:
            TypeError: `rows` is no tensor of integers.
            ValueError: It has another shape, or names a row that there is not.
        """
        if self._memory is None:
            return
        if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                "rows must be a Tensor of torch.int32 or torch.int64, got "
                f"{getattr(rows, 'dtype', type(rows))}"
            )
        if rows.dim() != 1:
            raise ValueError(f"rows must have shape [B'], got {tuple(rows.shape)}")
        batch = self.start.shape[0]
        if is_seen(rows) and not bool(((rows >= 0) & (rows < batch)).all()):
            raise ValueError(f"rows must be from 0 to {batch - 1}, got {rows.tolist()}")
        rows = rows.to(self.start.device)
        old = self.tensors
        with _normal():
            new = [x.index_select(0, rows) for x in old]
        if self._counts is not None:
            self._counts = self._counts.index_select(0, rows)
        if self.max_len is not None and rows.shape[0] == self.start.shape[0]:
            for x, y in zip(old, new, strict=True):
                x.copy_(y)
        else:
            *tensors, self.start, self.stop, self._counters = new
            self._memory = _Memory(*tensors)
            self._stay(*self.tensors)

    def repeat(self, repeats: int) -> None:
        """Repeat each row `repeats` times, one copy beside the other.

        Raises:
            TypeError: `repeats` is no int.
            ValueError: It is less than 1.
        """
        repeats = check_int("repeats", repeats, 1)
        rows = torch.arange(self.start.shape[0], device=self.start.device)
        self.select(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget all keys; the memory stays allocated."""
        self.start.zero_()
        self.stop.zero_()
        self._longest, self._even, self._counts = 0, True, None

    @property
    def keys(self) -> Tensor:
        """The keys in their slots, `[B, Hkv, S, D]`."""
        return self._slots("keys")

    @property
    def values(self) -> Tensor:
        """The values in their slots, `[B, Hkv, S, Dv]`."""
        return self._slots("values")

    @property
    def block_keys(self) -> Tensor:
        """The mean keys of the blocks, `[B, Hkv, N, D]`.

        A block without keys has any value, and one that lost keys keeps its value of before. The
        gate reads neither: no query chooses among blocks that are not full.
        """
        block_keys = self._filled().block_keys
        if self.max_len is not None:
            return block_keys
        return block_keys[:, :, : ceil_div(self._longest, self.block_size)]

    def memory(self) -> dict[str, int]:
        """Return the bytes that are allocated, for "keys and values" and for "blocks"."""
        return _bytes_of(self._memory)

    def slots(self, q_len: int, new: NewKeys | None = None) -> Slots:
        """Return where the keys lie, and the last `q_len` of them, which are the queries'.

        Args:
            q_len: Number of queries.
            new: Keys that are still to be appended.

        Raises:
            ValueError: `counts` were given to the last append, of another number of keys.
        """
        if self._counts is None or new is not None:
            return Slots(None, self.start, self.stop)
        if q_len != self._num_new:
            raise ValueError(
                f"q must have the {self._num_new} queries of the keys that were appended with "
                f"counts, got {q_len}"
            )
        return Slots(self.stop - self._counts, self.start, self.stop)

    def read(
        self, q: Tensor, new: NewKeys | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Slots | None]:
        """Return keys, values and block keys, and where those of each row lie.

        Without slots, each row has all the keys, and the queries are those of the last ones.

        Args:
            q: The queries.
            new: Keys that are still to be appended.
        """
        slots, memory = self.slots(q.shape[2], new), self._filled()
        # Kernels of few queries find the keys themselves, and launch faster while shapes stay.
        if new is not None or self.max_len is not None or (q.is_cuda and q.shape[2] <= _FEW):
            return memory.keys, memory.values, memory.block_keys, slots
        plain = self._even and q.shape[2] <= self._longest
        return self.keys, self.values, self.block_keys, None if plain else slots

    def pages(self) -> Pages | None:
        """Return the pages that hold the slots; None for rows in one piece."""
        return None

    def _require_room(self, stop: Tensor) -> None:
        """Raise if a row would get more keys than there are slots; if unreadable, assert it."""
        assert self.max_len is not None
        if not is_seen(stop):
            message = f"max_len must be at least the slots of each row, got {self.max_len}"
            torch._assert_async((stop <= self.max_len).all(), message)
        elif bool((stop > self.max_len).any()):
            raise self._no_room(int(stop.max()))

    def _no_room(self, stop: int) -> ValueError:
        return ValueError(
            f"max_len must be at least the slots of each row, got {self.max_len} for {stop} "
            "slots: make a longer cache"
        )

    def _make(self, k: Tensor, v: Tensor) -> "_Memory":
        """Allocate memory for tensors like `k` and `v`."""
        with _normal():
            self.start = torch.zeros(k.shape[0], dtype=torch.int32, device=k.device)
            self.stop = torch.zeros_like(self.start)
        return _Memory.of(k, v, self.max_len or k.shape[2] + _ROOM, self.block_size)

    def _filled(self) -> "_Memory":
        if self._memory is None:
            raise ValueError("cache must hold keys, got an empty one: append some")
        return self._memory

    def _slots(self, name: Literal["keys", "values"]) -> Tensor:
        tensor: Tensor = getattr(self._filled(), name)
        return tensor if self.max_len is not None else tensor[:, :, : self._longest]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that the cache writes to."""
        return *self._filled().tensors, self.start, self.stop, self.counters

    @property
    def counters(self) -> Tensor:
        """Zeros in which programs of kernels count, int32."""
        if self._counters is None:
            with _normal():
                self._counters = count_programs(self.stop, self._filled().keys.shape[1])
            self._stay(self._counters)
        return self._counters

    def _stay(self, *tensors: Tensor) -> None:
        """Tell PyTorch that these tensors of a cache with `max_len` stay where they are.

        Mode "reduce-overhead" makes no CUDA graph of code that writes to other tensors.
        """
        if self.max_len is not None and not is_traced():
            for x in tensors:
                torch._dynamo.mark_static_address(x)

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Allocate the memory for tensors like `k` and `v`; check them if there is some already.

        Raises:
            ValueError: Shapes, dtypes or devices do not fit the cache.
        """
        for name, x in (("k", k), ("v", v)):
            if x.dim() != 4:
                raise ValueError(f"{name} must have shape [B, Hkv, T, D], got {tuple(x.shape)}")
        if k.shape[:3] != v.shape[:3]:
            raise ValueError(
                f"v must have shape [B, Hkv, T, Dv] like k, got {tuple(v.shape)} beside "
                f"{tuple(k.shape)}"
            )
        # Under autocast they may differ in dtype.
        if not (k.is_floating_point() and v.is_floating_point()) or v.device != k.device:
            raise TypeError(
                "k and v must hold floating-point numbers on one device, got "
                f"{k.dtype} on {k.device} and {v.dtype} on {v.device}"
            )
        memory = self._memory
        if memory is None:
            memory = self._memory = self._make(k, v)
        if self._counters is None:
            self._stay(*self.tensors)
        batch = self.start.shape[0]
        for name, x, kept in (("k", k, memory.keys), ("v", v, memory.values)):
            same = x.dtype == kept.dtype and x.device == kept.device
            fitting = batch, kept.shape[1], kept.shape[3]
            if not same or (*x.shape[:2], x.shape[3]) != fitting:
                raise ValueError(
                    f"{name} must have shape {(*fitting[:2], 'T', fitting[2])}, "
                    f"{kept.dtype} on {kept.device} like the cache, got {tuple(x.shape)}, "
                    f"{x.dtype} on {x.device}"
                )


class PagedCache:
    """Memory for keys, values and block keys in pages, which rows take in any order.

    A page holds `page_size` slots of all heads. Rows that start alike may share the pages that are
    full.

    Attributes:
        num_pages: Number of pages.
        page_size: Slots per page, a multiple of `block_size`.
        block_size: Keys per block.

    Raises:
        TypeError: A number is no int.
        ValueError: A number is less than 1, or `page_size` no multiple of `block_size`.

    Example:
        >>> cache = PagedCache(num_pages=8, page_size=32, block_size=16)
        >>> block_table = torch.tensor([[5, 0, 3], [2, 7, 1]], dtype=torch.int32)
        >>> rows = cache.rows(block_table, lengths=torch.zeros(2, dtype=torch.int32))
        >>> rows.append(torch.randn(2, 2, 60, 32), torch.randn(2, 2, 60, 32))
        >>> rows.append(torch.randn(2, 2, 1, 32), torch.randn(2, 2, 1, 32))
        >>> cached_attention(torch.randn(2, 4, 1, 32), rows, top_k=3).shape, rows.stop.tolist()
        (torch.Size([2, 4, 1, 32]), [61, 61])
    """

    def __init__(self, num_pages: int, page_size: int, block_size: int) -> None:
        self.num_pages = check_int("num_pages", num_pages, 1)
        self.page_size = check_int("page_size", page_size, 1)
        self.block_size = check_int("block_size", block_size, 1)
        if self.page_size % self.block_size:
            raise ValueError(
                f"page_size must be a multiple of block_size = {self.block_size}, got "
                f"{self.page_size}"
            )
        self._memory: _Memory | None = None

    def rows(self, block_table: Tensor, lengths: Tensor) -> "PagedRows":
        """Return the rows of a batch, to append to and to attend to.

        Both tensors may be changed in place between calls, as a CUDA graph needs it. Lowering a
        length takes keys back.

        Args:
            block_table: Page of each `page_size` slots of a row, int32 `[B, W]`; behind the pages
                that a row needs it may hold anything. A page may belong to several rows while it
                is full in all of them.
            lengths: Number of keys of each row, int32 `[B]`, contiguous. `append` and `crop`
                change it. In compiled code read `stop`, which has the same memory: PyTorch makes
                no CUDA graph of code that takes both.

        Raises:
            TypeError: A tensor has the wrong dtype.
            ValueError: A tensor has the wrong shape, layout or device.
        """
        return PagedRows(self, block_table, lengths)

    def memory(self) -> dict[str, int]:
        """Return the bytes that are allocated, for "keys and values" and for "blocks"."""
        return _bytes_of(self._memory)


class PagedRows(BlockCache):
    """The rows of a batch whose slots lie in pages of a `PagedCache`; made by its `rows`.

    On CUDA, decode reads the pages where they lie. Other plans, and the CPU, copy each row into
    one piece first.
    """

    max_len: int
    _table: Tensor

    def __init__(self, cache: PagedCache, block_table: Tensor, lengths: Tensor) -> None:
        for name, x, dim in (("block_table", block_table, 2), ("lengths", lengths, 1)):
            if not isinstance(x, Tensor) or x.dtype != torch.int32:
                found = getattr(x, "dtype", type(x))
                raise TypeError(f"{name} must be a Tensor of torch.int32, got {found}")
            if x.dim() != dim:
                shape = ("B", "W")[:dim]
                raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
        if block_table.shape[0] != lengths.shape[0] or block_table.device != lengths.device:
            raise ValueError(
                f"lengths must be one number for each row of block_table, on its device, got "
                f"{tuple(lengths.shape)} on {lengths.device} beside {tuple(block_table.shape)} on "
                f"{block_table.device}"
            )
        if block_table.shape[1] == 0:
            raise ValueError("block_table must name at least one page, got shape [B, 0]")
        if not lengths.is_contiguous():
            raise ValueError(
                f"lengths must be contiguous, got strides {lengths.stride()}: use .contiguous()"
            )
        super().__init__(cache.block_size, max_len=block_table.shape[1] * cache.page_size)
        self._cache, self._table = cache, block_table
        # `detach` makes another tensor over the same memory: the caller's is not to be marked.
        self.start, self.stop = torch.zeros_like(lengths), lengths.detach()
        self._stay(self.start, self.stop)

    @property
    def _memory(self) -> "_Memory | None":
        return self._cache._memory  # which other rows may have allocated

    @_memory.setter
    def _memory(self, memory: "_Memory | None") -> None:
        self._cache._memory = memory

    @override
    def allocate(self, k: Tensor, v: Tensor) -> None:
        rows, device = self.stop.shape, self.stop.device
        for name, x in (("k", k), ("v", v)):
            if x.shape[:1] != rows or x.device != device:
                raise ValueError(
                    f"{name} must have {rows[0]} rows on {device} like lengths, got shape "
                    f"{tuple(x.shape)} on {x.device}"
                )
        super().allocate(k, v)

    @override
    def pages(self) -> Pages:
        memory = self._filled()
        return Pages(memory.keys, memory.values, memory.block_keys, self._table)

    @override
    def append(
        self, k: Tensor, v: Tensor, *, counts: Tensor | None = None, start: Tensor | None = None
    ) -> None:
        """Do what `BlockCache.append` does; `start` must be None, for rows start with a page."""
        if start is not None:
            raise ValueError(
                "start must be None for rows of pages, got a Tensor: leave padding out by counts"
            )
        super().append(k, v, counts=counts)

    @override
    def select(self, rows: Tensor) -> None:
        """Raise: pages are chosen by whoever keeps `block_table`."""
        raise ValueError(
            "rows must keep their pages, got a selection: change block_table and lengths"
        )

    @property
    @override
    def keys(self) -> Tensor:
        """A copy of the keys in their slots, `[B, Hkv, S, D]`."""
        return self.pages().joined()[0]

    @property
    @override
    def values(self) -> Tensor:
        """A copy of the values in their slots, `[B, Hkv, S, Dv]`."""
        return self.pages().joined()[1]

    @property
    @override
    def block_keys(self) -> Tensor:
        """A copy of the mean keys of the blocks, `[B, Hkv, N, D]`."""
        return self.pages().joined()[2]

    @override
    def _no_room(self, stop: int) -> ValueError:
        pages, size = self._table.shape[1], self._cache.page_size
        return ValueError(
            f"block_table must name pages for the slots of each row, got {pages} of {size} slots "
            f"for {stop} keys"
        )

    @override
    def _make(self, k: Tensor, v: Tensor) -> "_Memory":
        number = self._cache.num_pages
        k, v = (x.new_empty(number, x.shape[1], 0, x.shape[3]) for x in (k, v))
        return _Memory.of(k, v, self._cache.page_size, self.block_size)

    def _check(self) -> None:
        """Raise unless lengths and pages are in range, where their values can be seen."""
        if not is_seen(self.stop):
            return
        if not bool(((self.stop >= 0) & (self.stop <= self.max_len)).all()):
            raise ValueError(
                f"lengths must be from 0 to the {self.max_len} slots of a row, got "
                f"{self.stop.tolist()}"
            )
        number = torch.arange(self._table.shape[1], device=self.stop.device)
        used = number < ceil_div(self.stop, self._cache.page_size).unsqueeze(1)
        require_pages(self._table[used], self._cache.num_pages)

    @override
    def crop(self, tokens: int | Tensor) -> None:
        self._check()
        super().crop(tokens)

    @override
    def slots(self, q_len: int, new: NewKeys | None = None) -> Slots:
        self._check()
        return super().slots(q_len, new)


@dataclass
class _Memory:
    """The tensors of a cache, with room for `S` slots."""

    keys: Tensor
    values: Tensor
    sums: Tensor
    block_keys: Tensor

    @classmethod
    def of(cls, k: Tensor, v: Tensor, slots: int, block_size: int) -> Self:
        heads, blocks = k.shape[:2], ceil_div(slots, block_size)
        with _normal():
            return cls(
                k.new_empty(*heads, slots, k.shape[3]),
                v.new_empty(*heads, slots, v.shape[3]),
                k.new_empty(*heads, blocks, k.shape[3] + 1, dtype=torch.float32),
                k.new_empty(*heads, blocks, k.shape[3]),
            )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.sums, self.block_keys

    def with_room(self, slots: int, block_size: int) -> "_Memory":
        """Return this memory, or a larger copy if it has too little room."""
        room = self.keys.shape[2]
        if slots <= room:
            return self
        more = slots + max(_ROOM, room // 4)  # so that keys are copied few times each
        larger = _Memory.of(self.keys, self.values, more, block_size)
        for old, new in zip(self.tensors, larger.tensors, strict=True):
            new[:, :, : old.shape[2]] = old
        return larger


def _bytes_of(memory: _Memory | None) -> dict[str, int]:
    sizes = [0] if memory is None else [x.numel() * x.element_size() for x in memory.tensors]
    return {"keys and values": sum(sizes[:2]), "blocks": sum(sizes[2:])}


def _normal() -> AbstractContextManager[Any]:
    """Return a context whose tensors can be written to with and without inference mode."""
    return nullcontext() if is_traced() else torch.inference_mode(False)


def _row_numbers(name: str, x: Tensor, rows: Tensor, most: int) -> Tensor:
    """Return a number for each of `rows`, from 0 to `most`, as int32."""
    if not isinstance(x, Tensor) or x.dtype.is_floating_point or x.dtype == torch.bool:
        raise TypeError(f"{name} must be a Tensor of integers, got {getattr(x, 'dtype', type(x))}")
    if x.shape != rows.shape:
        raise ValueError(f"{name} must have shape [B] = ({rows.shape[0]},), got {tuple(x.shape)}")
    if x.dtype not in (torch.int32, torch.int64):
        x = x.long()  # a comparison would turn `most` into a narrower type
    good = x == x.clamp(0, most)
    if not is_seen(good):
        message = f"{name} must be from 0 to {most}, got another number"
        torch._assert_async(good.all(), message)
    elif not bool(good.all()):
        raise ValueError(f"{name} must be from 0 to {most}, got {x.tolist()}")
    return x.to(device=rows.device, dtype=torch.int32)


class _Gating(ScoreOptions, total=False):
    """Options of `cached_attention` that say what is computed."""

    top_k: Required[int]
    sink_blocks: int
    local_blocks: int
    head_top_k: Tensor | None


class _Options(_Gating, total=False):
    """Options of `cached_attention`."""

    counts: Tensor | None
    plan: Plan | Literal["auto"]


@overload
def cached_attention(
    q: Tensor,
    cache: BlockCache,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    return_aux: None = None,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def cached_attention(
    q: Tensor,
    cache: BlockCache,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    return_aux: AuxRequest,
    **options: Unpack[_Options],
) -> tuple[Tensor, AuxOutput]: ...
def cached_attention(
    q: Tensor,
    cache: BlockCache,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    top_k: int,
    counts: Tensor | None = None,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    head_top_k: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    plan: Plan | Literal["auto"] = "auto",
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Attend from the last queries of each row to the keys of a cache, as `moba_attention` does.

    The keys of the queries are given as `k` and `v`, and appended first; or they are in the cache
    already, by `cache.append`. On CUDA, one kernel appends and attends if queries are few. Keys
    that came in any number of chunks give the result of one call of `moba_attention`.

    Args:
        q: Queries, `[B, Hq, Q, D]`: the last `Q` of each row; or, if the last keys came with
            `counts`, those of the `T` new keys. Behind its count a row has padding, which gets
            zeros.
        cache: The keys and values.
        k: Keys to append, `[B, Hkv, T, D]`; None if there are none.
        v: Values to append, `[B, Hkv, T, Dv]`.
        counts: How many of the `T` each row takes, as of `cache.append`.
        top_k: Blocks a query attends to, its own included.
        sink_blocks: First blocks of a row that are always chosen; they count in `top_k`.
        local_blocks: Blocks right before the own one, always chosen; they count in `top_k`.
        head_top_k: Blocks that each head attends to, int `[Hq]`, or each head of each row, int
            `[B, Hq]`; at most `top_k`. May change from call to call.
        scale: Factor on the scores; None for `1 / sqrt(D)`.
        softcap: Soft cap of the scores.
        score_mod: As in FlexAttention; `kv_idx` is a slot, `q_idx` counts from 0.
        mask_mod: As in FlexAttention; `kv_idx` is a slot, `q_idx` counts from 0.
        plan: How to compute it.
        return_aux: What to return beside the output.

    Returns:
        The output `[B, Hq, Q, Dv]`, or with `return_aux` the output and an `AuxOutput`.

    Raises:
        ValueError: A shape, a device or an option is out of range, the cache is empty, or the plan
            cannot serve the request. Then nothing has been appended.
        TypeError: An argument has the wrong type.

    Example:
        >>> cache = BlockCache(block_size=16)
        >>> cache.append(torch.randn(2, 2, 100, 32), torch.randn(2, 2, 100, 32))
        >>> q, k, v = (torch.randn(2, heads, 1, 32) for heads in (4, 2, 2))
        >>> dense_and_sparse = torch.tensor([[7] * 4, [3] * 4])  # 7 blocks are all
        >>> cached_attention(q, cache, k, v, top_k=7, head_top_k=dense_and_sparse).shape
        torch.Size([2, 4, 1, 32])
        >>> cache.stop.tolist()
        [101, 101]
    """
    if not isinstance(cache, BlockCache):
        raise TypeError(
            f"cache must be a BlockCache, or the rows of a PagedCache, got {type(cache).__name__}"
        )
    request = partial(
        _request,
        q,
        cache,
        return_aux,
        top_k=top_k,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        head_top_k=head_top_k,
        scale=scale,
        softcap=softcap,
        score_mod=score_mod,
        mask_mod=mask_mod,
    )
    if k is None or v is None:
        if k is not None or v is not None or counts is not None:
            raise ValueError("k and v must be given together, and with counts, got None for one")
        return attend(request(None), plan, return_aux)
    with cache.restoring():
        new = cache._begin(k, v, counts=counts)
        # Under autocast a request has a copy of the cache.
        if plan in ("auto", "decode") and q.is_cuda and not torch.is_autocast_enabled("cuda"):
            asked = request(new)
            found = find_plan(plan, asked)
            if found.appends(asked):
                result = attend_by(found, asked, return_aux)
                cache._end(new)
                return result
        # The request is checked against lengths, and so after the append.
        kept = is_traced() or not cache.stop.is_cuda
        with nullcontext() if kept else cache._restoring(contents=True):
            cache._append(new)
            return attend(request(None), plan, return_aux)


def _request(
    q: Tensor,
    cache: BlockCache,
    return_aux: AuxRequest | None,
    new: NewKeys | None,
    **options: Unpack[_Gating],
) -> Request:
    """Return the checked request of a call of `cached_attention`.

    Args:
        q: The queries.
        cache: The cache.
        return_aux: What to return beside the output.
        new: Keys that are still to be appended.
        options: The options that say what is computed.
    """
    pages, block_keys = cache.pages(), None
    slots: Slots | None
    if pages is None:
        *tensors, slots = cache.read(q, new)
        q, k, v, block_keys = cast_by_autocast(q, *tensors)
    else:
        slots = cache.slots(q.shape[2], new)
        q, *cast = cast_by_autocast(q, *pages[:3])
        pages = Pages(cast[0], cast[1], cast[2], pages.table)
        # Nobody reads what stands in for the rows.
        k, v = (
            x[:1, :, :1].expand(slots.stop.shape[0], -1, cache.max_len or 0, -1) for x in pages[:2]
        )
    return cached_request(
        q,
        k,
        v,
        block_keys,
        slots,
        pages=pages,
        counters=cache.counters if q.is_cuda else None,
        new=new,
        return_aux=return_aux,
        block_size=cache.block_size,
        **options,
    )
