"""Attention of sequences that are sharded over several processes (docs/context_parallel.md)."""

from .context_parallel import context_parallel_attention
from .ring import ring_attention, ring_attention_jvp
from .sharding import positions, shard, unshard
from .ulysses import ulysses_attention, ulysses_attention_jvp

__all__ = [
    "context_parallel_attention",
    "positions",
    "ring_attention",
    "ring_attention_jvp",
    "shard",
    "ulysses_attention",
    "ulysses_attention_jvp",
    "unshard",
]
