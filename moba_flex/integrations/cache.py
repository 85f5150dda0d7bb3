"""Cache layers of transformers that keep the gate's block keys."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from moba_flex.cache import BlockCache
from moba_flex.config import MoBAConfig
from moba_flex.integrations.layout import first_slots
from moba_flex.masks._torch.exporting import is_traced
from moba_flex.masks.checks import is_seen


class _Blocks:
    """What both kinds of layers do: they keep keys and values in a `BlockCache`.

    Attributes:
        blocks: The cache.
    """

    blocks: BlockCache
    keys: Any
    values: Any
    _seen: Tensor | None = None  # the keys as transformers saw them last

    def _restoring(self) -> AbstractContextManager[None]:
        """Return a context that leaves the layer as it was if its body raises."""
        return nullcontext() if is_traced() else self._restored()

    @contextmanager
    def _restored(self) -> Iterator[None]:
        attributes = vars(self).copy()
        try:
            with self.blocks.restoring():
                yield
        except BaseException:
            for name in vars(self).keys() - attributes.keys():
                delattr(self, name)
            vars(self).update(attributes)
            raise

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        blocks, start = self.blocks, first_slots()
        if start is not None:  # a mask may tell another one later: see `blocks_of`
            blocks.allocate(k, v)
            blocks.start_at(start)
        blocks.append(k, v)
        self._show()
        return self.keys, self.values  # these objects: see `blocks_of`

    def _take_cut_keys(self) -> None:
        """Let the cache hold what a caller has cut `keys` and `values` to, if one has."""
        if self.keys is None or self.keys is self._seen:
            return
        k, v = self.keys.clone(), self.values.clone()  # which may lie in the memory of the cache
        with self._restoring():
            self.blocks.reset()
            self.blocks.append(k, v, start=first_slots())
            self._show()

    def _show(self) -> None:
        """Let transformers see the tensors of the cache after a change."""
        self.keys, self.values = self.blocks.keys, self.blocks.values
        self._seen = self.keys

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row `i` a copy of row `beam_idx[i]`."""
        if self.keys is not None:
            self.blocks.select(beam_idx)
            self._show()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, one copy beside the other."""
        if self.keys is not None:
            self.blocks.repeat(repeats)
            self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, by their numbers or by a mask."""
        if self.keys is not None:
            self.blocks.select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)
            self._show()

    def offload(self) -> None:
        """Refuse; `adopt` leaves offloaded caches as they are."""
        raise ValueError(
            "cache must stay on its device, got a call to offload it: offload from the start, by "
            "DynamicCache(offloading=True)"
        )

    prefetch = offload


class BlockDynamicLayer(_Blocks, DynamicLayer):  # type: ignore[no-untyped-call]
    """A `DynamicLayer` with block keys, which grows without a copy of all keys in each step.

    Example:
        >>> layer = BlockDynamicLayer(block_size=16)
        >>> keys, values = layer.update(torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8))
        >>> keys.shape, layer.blocks.block_keys.shape
        (torch.Size([1, 2, 40, 8]), torch.Size([1, 2, 3, 8]))
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.blocks = BlockCache(block_size)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; memory is allocated with the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, Hkv, T, D]`, and return all."""
        self._take_cut_keys()
        with self._restoring():
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            return self._append(key_states, value_states)

    def get_seq_length(self) -> int:
        """Return the number of slots in use."""
        return 0 if self.keys is None else int(self.keys.shape[2])

    def reset(self) -> None:
        """Forget all keys."""
        self.blocks.reset()
        self.keys = self.values = None

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` keys."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be at most 0, got {tokens_to_remove}")
        if self.keys is not None:
            self.blocks.crop(-tokens_to_remove)
            self._show()


class BlockStaticLayer(_Blocks, StaticLayer):  # type: ignore[no-untyped-call]
    """A `StaticLayer` with block keys.

    Example:
        >>> layer = BlockStaticLayer(block_size=16, max_cache_len=64)
        >>> keys, values = layer.update(torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8))
        >>> keys.shape, layer.get_seq_length()
        (torch.Size([1, 2, 64, 8]), tensor(40))
    """

    def __init__(self, block_size: int, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.blocks = BlockCache(block_size, max_cache_len)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the memory."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[3], value_states.shape[3]
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.blocks.allocate(key_states, value_states)
        self._show()
        assert self.keys is not None
        assert self.values is not None
        # Dense attention, which a model may be switched to, multiplies hidden values by zero.
        self.keys.zero_()
        self.values.zero_()
        if not is_traced():
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, Hkv, T, D]`, and return all slots."""
        self._take_cut_keys()
        with self._restoring():
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            shown = self._append(key_states, value_states)
            self.cumulative_length.add_(key_states.shape[2])
        return shown

    def reset(self) -> None:
        """Forget all keys."""
        self.blocks.reset()
        self.cumulative_length.zero_()


def adopt(cache: Any, config: MoBAConfig, num_layers: int) -> None:
    """Give a cache layers with block keys, for the layers that route.

    Layers that keep other things than all keys, such as those of a window or quantized ones, and
    caches that are offloaded, stay as they are: without block keys, each call pools all keys.

    Args:
        cache: A cache of transformers; its `layers` are replaced.
        config: The options of the model.
        num_layers: Number of layers of the model.
    """
    # A cache hands on no gradients: where they are wanted, plain layers do.
    if is_traced() or config.cached != "route" or torch.is_grad_enabled():
        return
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        while len(cache.layers) < num_layers:
            cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
    for index, layer in enumerate(cache.layers[:num_layers]):
        if config.is_dense(index, num_layers):
            continue
        made: BlockDynamicLayer | BlockStaticLayer
        if type(layer) is DynamicLayer:
            made = BlockDynamicLayer(config.block_size)
            used = layer.get_seq_length()
        elif type(layer) is StaticLayer:
            made = BlockStaticLayer(config.block_size, layer.max_cache_len)
            used = int(layer.get_seq_length())
        else:
            continue
        if used and layer.keys is not None and layer.values is not None:
            made.update(layer.keys[:, :, :used], layer.values[:, :, :used])
        cache.layers[index] = made


def blocks_of(
    cache: Any, layer_idx: int | None, key: Tensor, block_size: int, start: Tensor
) -> BlockCache | None:
    """Return what holds `key` and its block keys in a cache; None if nothing does.

    The result is None, too, if a later mask says that rows start elsewhere.
    """
    if not isinstance(cache, Cache) or layer_idx is None or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    if not isinstance(layer, _Blocks) or layer.keys is not key:  # a layer may share another's keys
        return None
    same = layer.blocks.start == start
    if layer.blocks.block_size != block_size:
        return None
    if not is_seen(same):
        torch._assert_async(
            same.all(), "attention_mask must start rows where it did before, got another start"
        )
    elif not bool(same.all()):
        return None
    return layer.blocks
