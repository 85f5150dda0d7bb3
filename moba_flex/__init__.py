"""Mixture of Block Attention (MoBA) for PyTorch, as routing for FlexAttention.

Names are imported when they are first used: PyTorch's compiler, which they need, takes longer to
import than PyTorch itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moba_flex.attention import choose_plan, moba_attention, routed_attention
    from moba_flex.cache import BlockCache, PagedCache, cached_attention
    from moba_flex.config import MoBAConfig
    from moba_flex.masks import patterns
    from moba_flex.masks.block_mask import create_moba_block_mask
    from moba_flex.masks.layout import Layout, make_tables
    from moba_flex.masks.router import route
    from moba_flex.masks.routing import Routing
    from moba_flex.module import MoBAAttention
    from moba_flex.oracle import moba_attention_reference

    Tables = Layout

__all__ = [
    "BlockCache",
    "Layout",
    "MoBAAttention",
    "MoBAConfig",
    "PagedCache",
    "Routing",
    "Tables",
    "cached_attention",
    "choose_plan",
    "create_moba_block_mask",
    "make_tables",
    "moba_attention",
    "moba_attention_reference",
    "patterns",
    "route",
    "routed_attention",
]

_HOMES = {
    "BlockCache": "cache",
    "Layout": "masks.layout",
    "MoBAAttention": "module",
    "MoBAConfig": "config",
    "PagedCache": "cache",
    "Routing": "masks.routing",
    "cached_attention": "cache",
    "choose_plan": "attention",
    "create_moba_block_mask": "masks.block_mask",
    "make_tables": "masks.layout",
    "moba_attention": "attention",
    "moba_attention_reference": "oracle",
    "route": "masks.router",
    "routed_attention": "attention",
}
_MODULES = {
    "compile": "compile",
    "diagnostics": "diagnostics",
    "distributed": "distributed",
    "masks": "masks",
    "patterns": "masks.patterns",
}


def __getattr__(name: str) -> Any:
    if name == "Tables":  # what `Layout` was called up to 0.1
        value = __getattr__("Layout")
    elif name in _HOMES:
        value = getattr(import_module(f"moba_flex.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"moba_flex.{_MODULES[name]}")
    else:
        raise AttributeError(f"module 'moba_flex' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
