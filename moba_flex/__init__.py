"""Mixture of Block Attention (MoBA) for PyTorch, as routing for FlexAttention."""

from moba_flex.attention import choose_plan, moba_attention, routed_attention
from moba_flex.config import MoBAConfig
from moba_flex.masks import patterns
from moba_flex.masks.block_mask import create_moba_block_mask
from moba_flex.masks.layout import Tables, make_tables
from moba_flex.masks.router import route
from moba_flex.masks.routing import Routing
from moba_flex.module import MoBAAttention
from moba_flex.oracle import moba_attention_reference

__all__ = [
    "MoBAAttention",
    "MoBAConfig",
    "Routing",
    "Tables",
    "choose_plan",
    "create_moba_block_mask",
    "make_tables",
    "moba_attention",
    "moba_attention_reference",
    "patterns",
    "route",
    "routed_attention",
]
