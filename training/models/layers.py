"""Layers of the diffusion transformer; the attention function is an argument."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from training.attentions import ours
from training.kernels import residual_norm
from training.kernels.inputs import takes
from training.kernels.mlp import mlp as fused_mlp
from training.kernels.self_attention import self_attention, self_attention_jvp, supports
from training.kernels.split_heads import split_heads as fused_split_heads
from training.models.jvp_layers import (
    Dropout,
    Dual,
    Linear,
    Tensor,
    add,
    attend,
    gated_residual,
    gelu,
    layer_norm,
    linear_map,
    modulate,
    multiply,
    primal,
    rms_norm,
    silu,
    unpack,
)

Attention = Callable[..., torch.Tensor]  # (query, key, value), each (B, H, N, D) -> (B, H, N, D)


NORMS: dict[str, Callable[[Tensor], Tensor]] = {"layer": layer_norm, "rms": rms_norm}


def rotate(x: Tensor, angles: torch.Tensor) -> Tensor:
    """Rotary positions (RoPE, arXiv 2104.09864): pairs of neighbouring features turned by their
    angle.

    x: (B, H, N, D); angles: (n, D/2), n <= N. The N - n leading tokens have no place on the grid
    and are left as they are.
    """
    return linear_map(lambda x: _rotate(x, angles), x)


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    prefix, x = x.tensor_split([x.shape[-2] - len(angles)], dim=-2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, H, n, D/2)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([prefix, turned], -2)


def split_heads(x: Tensor, parts: int, heads: int) -> list[Tensor]:
    """(B, N, parts H D) -> parts of (B, H, N, D), as views."""
    pattern = "b n (parts h d) -> parts b h n d"
    return unpack(lambda x: rearrange(x, pattern, parts=parts, h=heads).unbind(), x)


def join_heads(x: Tensor) -> Tensor:
    return linear_map(lambda x: rearrange(x, "b h n d -> b n (h d)"), x)


def fusable(x: Tensor) -> bool:
    """Whether the kernels of a product's two sides take x: the tangent is a constant, if any."""
    return not (isinstance(x, Dual) and x.through) and takes(primal(x))


def product_without_bias_gradient(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear`` of value and tangent; whoever reads the value makes the gradient of the bias."""
    bias = None if linear.bias is None else linear.bias.detach()
    z = functional.linear(primal(x), linear.weight, bias)
    if not isinstance(x, Dual):
        return z
    with x.rule():
        return x.follow(z, functional.linear(x.tangent, linear.weight))


class QueryKeyNorm(nn.Module):
    """RMS norm of queries and keys over the features of a head (arXiv 2010.04245)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.ones(head_dim))
        self.key = nn.Parameter(torch.ones(head_dim))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return multiply(rms_norm(q), self.query), multiply(rms_norm(k), self.key)


class SelfAttention(nn.Module):
    """Attention among the tokens of an image, (B, N, W) to (B, N, W), behind one projection."""

    sequence: Any = None  # tokens are shared with other processes: set by ``context_parallel``

    def __init__(
        self,
        width: int,
        heads: int,
        attention: Attention,
        qk_norm: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = Linear(width, 3 * width, bias)
        self.qk_norm = QueryKeyNorm(width // heads) if qk_norm else None
        self.projection = Linear(width, width, bias)

    def project_in(
        self, x: Tensor, angles: torch.Tensor | None, fused: bool = False
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values, for ``attend``. (B, N, W) -> (B, H, N, D). ``fused``: kernels
        of ours join their gradients and sum that of the bias. Where attention can write the joined
        gradient itself, they stay one product (B, N, 3 W).
        """
        if fused and fusable(x):
            z = product_without_bias_gradient(self.qkv, x)
            if self._takes_product(z, angles):
                return (z,)
            q, k, v = fused_split_heads(primal(z), self.qkv.bias, self.heads)
            if isinstance(z, Dual):
                tangents = map(primal, split_heads(z.tangent, 3, self.heads))
                q, k, v = map(z.follow, (q, k, v), tangents)
        else:
            q, k, v = split_heads(self.qkv(x), 3, self.heads)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return q, k, v

    def _takes_product(self, z: Tensor, angles: Any) -> bool:
        """Whether attention is ours, of the product as it is, and few examples have a tangent, so
        that the values of all are one call (``jvp_layers.attend``).
        """
        few = not isinstance(z, Dual) or 2 * len(z.tangent) <= len(z.primal)
        asis = angles is None and self.qk_norm is None and self.sequence is None
        if not (few and asis and supports(primal(z), self.heads)):
            return False
        given = ours(self.attention)
        return given is not None and not given.keywords

    def attend(self, *heads: Tensor) -> Tensor:
        if len(heads) == 3:
            attention = self.attention if self.sequence is None else self.sequence.attention
            return attend(attention, *heads)
        (z,) = heads
        if not isinstance(z, Dual):
            return self_attention(z, self.qkv.bias, self.heads)
        return z.follow(*self_attention_jvp(z.primal, z.tangent, self.qkv.bias, self.heads))

    def project_out(self, out: Tensor, fused: bool = False) -> tuple[Tensor, torch.Tensor | None]:
        """(B, H, N, D) -> y (B, N, W) and, if ``fused``, the bias in y, whose gradient is left to
        whoever reads y.
        """
        out = join_heads(out)
        if fused and fusable(out):
            return product_without_bias_gradient(self.projection, out), self.projection.bias
        return self.projection(out), None


class CrossAttention(nn.Module):
    """Tokens attend to a context. The context depends on neither image nor time, so that its keys
    and values have no tangent: attention is told None and leaves out their products.
    """

    def __init__(self, width: int, heads: int, attention: Attention, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.qk_norm = QueryKeyNorm(width // heads) if qk_norm else None
        self.projection = Linear(width, width)

    def forward(self, x: Tensor, context: torch.Tensor) -> Tensor:
        (q,) = split_heads(self.query(x), 1, self.heads)
        k, v = split_heads(self.key_value(context), 2, self.heads)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        return self.projection(join_heads(attend(self.attention, q, k, v)))


def contracted(linear: nn.Linear, x: Tensor, fused: bool) -> tuple[Tensor, torch.Tensor | None]:
    """The last product of a block and, if ``fused``, the bias in it whose gradient is left to the
    next block, which reads the product.
    """
    if fused and fusable(x):
        return product_without_bias_gradient(linear, x), handed_over(linear.bias)
    return linear(x), None


def handed_over(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A copy in float32: a parameter is no output of a compiled graph, and a block that is sharded
    frees its own.
    """
    return None if bias is None else bias.to(torch.float32, copy=True)


class Mlp(nn.Module):
    """Two projections with GELU between them, (B, N, W) to (B, N, W)."""

    def __init__(self, width: int, hidden: int, dropout: float, bias: bool = True) -> None:
        super().__init__()
        self.expand = Linear(width, hidden, bias)
        self.dropout = Dropout(dropout)
        self.contract = Linear(hidden, width, bias)

    def forward(self, x: Tensor, fused: bool = False) -> tuple[Tensor, torch.Tensor | None]:
        """The branch and, if ``fused``, its bias, see ``contracted``. It is then one operator, in
        which GELU and its tangent are no pass of their own, unless units are dropped.
        """
        if fused and fusable(x) and not self.dropout.drops:
            dtype = autocast_dtype(primal(x))
            y = fused_mlp(linear_map(lambda x: x.to(dtype), x), self.expand, self.contract)
            return y, handed_over(self.contract.bias)
        return contracted(self.contract, self.dropout(gelu(self.expand(x))), fused)


class SwiGLU(nn.Module):
    """silu(A x) ∘ B x, contracted (arXiv 2002.05202); 2/3 of the hidden width costs what Mlp
    costs.
    """

    def __init__(self, width: int, hidden: int, dropout: float, bias: bool = True) -> None:
        super().__init__()
        self.expand = Linear(width, 2 * hidden, bias)
        self.dropout = Dropout(dropout)
        self.contract = Linear(hidden, width, bias)

    def forward(self, x: Tensor, fused: bool = False) -> tuple[Tensor, torch.Tensor | None]:
        """The branch and, if ``fused``, its bias, see ``contracted``."""
        gate, x = unpack(lambda x: x.chunk(2, -1), self.expand(x))
        return contracted(self.contract, self.dropout(multiply(silu(gate), x)), fused)


MLPS: dict[str, type[nn.Module]] = {"gelu": Mlp, "swiglu": SwiGLU}


class Modulation(nn.Module):
    """Vectors that shift, scale and gate ``branches``; without gate for the last layer. Linear in
    the condition (adaLN), with ``norm`` each of RMS 1 (TVM, arXiv 2511.19797); or, where the
    condition comes as tokens, learned constants without a shift: 1 + scale is then the weight of
    the norm. Zero at initialisation.
    """

    def __init__(
        self, width: int, branches: int, gated: bool, conditioned: bool, norm: bool = False
    ) -> None:
        super().__init__()
        self.branches, self.norm = branches, norm
        n = branches * (1 + conditioned + gated)
        self.linear = Linear(width, n * width) if conditioned else None
        self.constants = None if conditioned else nn.Parameter(torch.zeros(n * width))
        self.n = n

    def forward(self, condition: Tensor | None) -> list[Tensor]:
        """(B, W) -> shift, scale (and gate) of each branch, each (B or 1, 1, W)."""
        if self.linear is not None:
            vectors = self.linear(condition)
            vectors = unpack(lambda x: [part[:, None] for part in x.chunk(self.n, -1)], vectors)
            return [rms_norm(x) for x in vectors] if self.norm else vectors
        constants = self.constants[None, None].chunk(self.n, -1)  # type: ignore[index]
        zero, each = torch.zeros_like(constants[0]), self.n // self.branches
        parts = [constants[i : i + each] for i in range(0, self.n, each)]
        return [vector for part in parts for vector in (zero, *part)]


class Residual(NamedTuple):
    """x + gate branch, not added yet: the norm that follows does it in its own pass."""

    x: Tensor  # (B, N, W)
    gate: Tensor  # (B, 1, W)
    branch: Tensor  # (B, N, W)
    bias: torch.Tensor | None = None  # (W,), in branch, whose gradient is made where it is read


Stream = Tensor | Residual


def settled(x: Stream) -> Tensor:
    if not isinstance(x, Residual):
        return x
    x, gate, branch, bias = x
    return gated_residual(x, gate, with_bias_gradient(branch, bias))


class _WithBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.dtype = bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return d_y, d_y.flatten(0, -2).sum(0, dtype=ctx.dtype)


def with_bias_gradient(y: Tensor, bias: torch.Tensor | None) -> Tensor:
    """y; the sum of its gradient over the tokens is also that of ``bias``, which is in y."""
    if bias is None or not (torch.is_grad_enabled() and bias.requires_grad):
        return y
    value = _WithBias.apply(primal(y), bias)
    return y.follow(value, y.tangent) if isinstance(y, Dual) else value


def begin(x: Tensor, n: int, bias: torch.Tensor | None) -> Residual:
    """x as a residual with nothing in its branch. It is laid out as what a block leaves that has
    ``n`` modulations and ``bias`` in its last product: one compiled graph then serves the first
    block too.
    """
    wanted = torch.is_grad_enabled() and primal(x).requires_grad

    def nothing(x: torch.Tensor, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = autocast_dtype(x)
        branch = torch.zeros_like(x, dtype=dtype, requires_grad=wanted)
        rows = x.new_zeros(len(x), n * x.shape[-1], dtype=dtype, requires_grad=wanted)
        return rows.chunk(n, -1)[-1][:, None], branch

    gate, branch = nothing(primal(x), wanted)
    zero = None
    if bias is not None and fusable(x):
        trained = wanted and bias.requires_grad
        zero = primal(x).new_zeros(branch.shape[-1], dtype=torch.float32, requires_grad=trained)
    if not isinstance(x, Dual):
        return Residual(x, gate, branch, zero)
    x = x.follow(x.primal, x.tangent.to(x.primal.dtype))
    t_gate, t_branch = nothing(x.tangent, wanted and x.through)
    return Residual(x, x.follow(gate, t_gate), x.follow(branch, t_branch), zero)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """Of what a matrix product makes of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def normed(
    x: Stream, norm: Callable[[Tensor], Tensor], shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """x settled, and its norm modulated: in one kernel where there is one, else layer by layer."""
    if isinstance(x, Residual):
        *stream_parts, bias = x
        parts = (*stream_parts, shift, scale)
        if residual_norm.supports(*map(primal, parts)) and (tangents := _constants(parts)):
            stream, gate, branch, shift_, scale_ = map(primal, parts)
            rows = [a[:, 0] for a in (gate, shift_, scale_)]
            x2, h, t_x2, t_h = residual_norm.residual_norm(
                stream, rows[0], branch, bias, rows[1], rows[2], tangents[0],
                norm is rms_norm, autocast_dtype(stream),
            )  # fmt: skip
            if t_x2 is None or t_h is None:
                return x2, h
            return Dual(x2, t_x2), Dual(h, t_h)
    x = settled(x)
    return x, modulate(norm(x), shift, scale)


def _constants(parts: tuple[Tensor, ...]) -> list[Any]:
    """[the tangents of all parts, which are constants], [None] where no part has one, or nothing:
    the kernel does not serve these.
    """
    duals = [x for x in parts if isinstance(x, Dual)]
    if not duals:
        return [None]
    if len(duals) < len(parts) or any(x.through for x in duals):
        return []
    t_x, t_gate, t_branch, t_shift, t_scale = (x.tangent for x in duals)
    return [(t_x, t_gate[:, 0], t_branch, t_shift[:, 0], t_scale[:, 0])]


class Block(nn.Module):
    """adaLN-zero block (DiT, arXiv 2212.09748): the condition shifts, scales and gates both
    branches; between them, if asked for, attention to a context.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        attention: Attention,
        norm: str = "layer",
        mlp: str = "gelu",
        qk_norm: bool = False,
        conditioned: bool = True,
        cross: bool = False,
        bias: bool = True,
        modulation_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm = NORMS[norm]
        self.attention = SelfAttention(width, heads, attention, qk_norm, bias)
        self.cross = CrossAttention(width, heads, attention, qk_norm) if cross else None
        self.mlp = MLPS[mlp](width, int(mlp_ratio * width), dropout, bias)
        self.modulation = Modulation(width, 2, True, conditioned, modulation_norm)

        self.checkpointing = "none"  # see ``activation_checkpointing``

    def forward(
        self,
        x: Stream,  # (B, N, W)
        condition: Tensor | None = None,  # (B, W)
        angles: torch.Tensor | None = None,  # (n, D/2), of the n last tokens
        context: torch.Tensor | None = None,  # (B, M, W)
    ) -> Stream:
        """A ``Residual`` where x is one, and a tensor where it is not."""
        if self.cross is not None and context is None:
            raise ValueError("context must be (B, M, W) for cross attention; got None")
        keep = self.checkpointing if torch.is_grad_enabled() else "none"
        vectors = self.modulation(condition)

        def whole(x: Any, vectors: Any) -> Any:  # torch 2.8 traces no `list[Tensor]`
            part = _recomputed if keep == "attention" else _kept
            fused = isinstance(x, Residual)
            x, *heads = part(self._before_attention, x, vectors, angles)
            out = self.attention.attend(*heads)
            return part(self._after_attention, x, vectors, out, context, fused)

        out = Residual(*(_recomputed if keep == "block" else _kept)(whole, x, vectors))
        return out if isinstance(x, Residual) else settled(out)

    def _before_attention(self, x: Stream, vectors: list[Tensor], angles: Any) -> Any:
        shift, scale, *_ = vectors
        fused = isinstance(x, Residual)
        x, h = normed(x, self.norm, shift, scale)
        return x, *self.attention.project_in(h, angles, fused)

    def _after_attention(
        self, x: Tensor, vectors: list[Tensor], out: Tensor, context: Any, fused: bool
    ) -> tuple[Any, ...]:
        _, _, gate_a, shift, scale, gate_m = vectors
        fused_norm = fused and self.cross is None
        stream: Stream = Residual(x, gate_a, *self.attention.project_out(out, fused_norm))
        if not fused_norm:
            stream = x = settled(stream)
        if self.cross is not None:
            stream = add(x, self.cross(self.norm(x), context))
        x, h = normed(stream, self.norm, shift, scale)
        return x, gate_m, *self.mlp(h, fused)


def _kept(f: Callable[..., Any], *args: Any) -> Any:
    return f(*args)


def _recomputed(f: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(f, *args, use_reentrant=False)


class FinalLayer(nn.Module):
    """Tokens to pixels; its zero weights make the network exactly 0 at initialisation."""

    def __init__(
        self,
        width: int,
        patch: int,
        channels: int,
        norm: str = "layer",
        conditioned: bool = True,
        modulation_norm: bool = False,
    ) -> None:
        super().__init__()
        self.patch, self.norm = patch, NORMS[norm]
        self.modulation = Modulation(width, 1, False, conditioned, modulation_norm)
        self.projection = Linear(width, channels * patch * patch)

    def forward(self, x: Stream, condition: Tensor | None, rows: int | None) -> Tensor:
        """An image of so many rows of patches, (B, C, S, S); None: the patches, (B, N, C p p)."""
        shift, scale = self.modulation(condition)
        patches = self.projection(normed(x, self.norm, shift, scale)[1])
        return patches if rows is None else self.image(patches, rows)

    def image(self, patches: Tensor, rows: int) -> Tensor:
        pattern, p = "b (h w) (c p q) -> b c (h p) (w q)", self.patch
        return linear_map(lambda x: rearrange(x, pattern, h=rows, p=p, q=p), patches)
