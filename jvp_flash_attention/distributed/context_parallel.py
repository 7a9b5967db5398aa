"""One attention function for sharded sequences, to be injected into a model.

"2d" is Ulysses inside and a ring across: the mesh is (ring, ulysses). Heads are dealt out among
the processes of the second dimension, which hold one shard of the ring together. Keys travel along
the first one. So the heads bound the second dimension alone.
"""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import api
from . import rules
from .ring import ring_backend
from .sharding import shard_lengths
from .ulysses import attend, attend_jvp, members

KINDS = ("ring", "ulysses", "2d")


class ContextParallelAttention:
    """`attention` of the shards of a mesh, with the signature of SDPA; made by
    `context_parallel_attention`. Nothing in a call depends on the mesh any more, so it can be
    compiled."""

    def __init__(
        self,
        mesh: DeviceMesh,
        kind: str,
        layout: str,
        lengths: tuple[int, int] | None,
        backend: str | None,
        tangent_grad: bool,
    ):
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        rules.dimensions(f"context parallel {kind!r}", mesh, 2 if kind == "2d" else 1)
        rules.whole("context parallel", lengths)
        if kind == "ulysses" and layout != "contiguous":
            raise ValueError(
                f"context parallel 'ulysses' needs the layout 'contiguous', got {layout!r}; it is"
                " balanced under a causal mask as it is"
            )
        self.backend, self.lengths, self.heads = backend, lengths, None
        self.tangent_grad = tangent_grad
        if kind == "ulysses":
            self.heads = members(mesh)
        elif kind == "ring":
            self.backend = ring_backend(mesh, layout, lengths, backend)
        else:
            across, inside = (mesh[name] for name in mesh.mesh_dim_names or _nameless())
            self.backend = ring_backend(across, layout, lengths, backend)
            self.heads = members(inside)
            if lengths is not None:  # of what is gathered inside: this process's shard of the ring
                held = (shard_lengths(n, across.size(), layout) for n in lengths)
                L, S = (n[across.get_local_rank()] for n in held)
                self.lengths = (L, S)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args,
        **named,
    ) -> Tensor:
        """As `ring_attention` and `ulysses_attention`, with the arguments of SDPA."""
        numbers, softcap = rules.numbers(*args, **named)
        if self.heads is not None:
            numbers, how = (*numbers, self.backend, softcap), (self.heads, self.lengths)
            return attend(query, key, value, attn_mask, numbers, *how, self.tangent_grad)
        rules.arguments("ring_attention", query, key, attn_mask, numbers[0])
        how = {"backend": self.backend, "tangent_grad": self.tangent_grad, "softcap": softcap}
        return api.attention(query, key, value, attn_mask, *numbers, **how)

    def jvp(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        t_query: Tensor | None,
        t_key: Tensor | None,
        t_value: Tensor | None,
        attn_mask: Tensor | None = None,
        *args,
        tangent_grad: bool | None = None,
        **named,
    ) -> tuple[Tensor, Tensor]:
        """(O, tO) as `ring_attention_jvp` and `ulysses_attention_jvp`; `tangent_grad` replaces the
        one that was given to `context_parallel_attention`."""
        through = self.tangent_grad if tangent_grad is None else tangent_grad
        numbers, softcap = rules.numbers(*args, **named)
        given, tangents = (query, key, value), (t_query, t_key, t_value)
        if self.heads is not None:
            numbers, how = (*numbers, self.backend, softcap), (self.heads, self.lengths, through)
            return attend_jvp(*given, tangents, attn_mask, numbers, *how)
        rules.arguments("ring_attention", query, key, attn_mask, numbers[0])
        how = {"backend": self.backend, "tangent_grad": through, "softcap": softcap}
        return api.attention_jvp(*given, *tangents, attn_mask, *numbers, **how)


def context_parallel_attention(
    mesh: DeviceMesh,
    kind: str = "ring",
    *,
    layout: str = "contiguous",
    lengths: tuple[int, int] | None = None,
    backend: str | None = None,
    tangent_grad: bool = True,
) -> ContextParallelAttention:
    """An attention function of sharded sequences, (B, H, local L, D), for models that take one.

    It is called as `F.scaled_dot_product_attention`, plainly or under `torch.func.jvp`, and its
    `jvp` as `attention_jvp`. What depends on the position (rotary embeddings) must be given this
    process's `positions`.

    Args:
        mesh: 1-D for "ring" and "ulysses"; 2-D with names, (ring, ulysses), for "2d".
        kind: "ring", "ulysses" or "2d".
        layout: of the sequence over the processes of a ring: "contiguous" or "zigzag".
        lengths: (L, S) of the whole sequences; None where every process holds as many rows.
        backend, tangent_grad: as for `attention`.

    Raises:
        TypeError, ValueError: kind, mesh and layout do not fit. Calls raise as `ring_attention` and
            `ulysses_attention`.
    """
    return ContextParallelAttention(mesh, kind, layout, lengths, backend, tangent_grad)


def _nameless():
    raise ValueError(
        "context parallel '2d' needs a mesh with names, got none; pass"
        " mesh_dim_names=('ring', 'ulysses') to init_device_mesh"
    )
