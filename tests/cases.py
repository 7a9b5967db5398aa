"""Random problems, their float64 solution and the comparison by name, for every implementation
alike.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jvp_flash_attention import reference
from jvp_flash_attention.block_mask import block_mask
from jvp_flash_attention.call import Inputs, Spec, Tangents
from tests import tolerances


@dataclass(frozen=True)
class Case:
    """One call.  `tangents` names the inputs that have one, among q, k, v and b (the mask)."""

    B: int = 2
    H: int = 2
    Hk: int = 2
    L: int = 33
    S: int = 40
    D: int = 16
    Dv: int | None = None
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    packed: tuple | None = None  # (cu_q, cu_k or None) as tuples: sequences behind one another
    lower_right: bool = False
    blocks: Any = None  # a block mask: bool (.., nQ, nK) as nested tuples, in blocks of
    block_sizes: tuple[int, int] = (128, 256)
    mask: str | None = None  # bool, key (B,1,1,S), row (1,H,L,1), full (B,H,L,S) with a row of -inf
    tangents: str = "qkvb"
    dropout_p: float = 0.0
    t_rows: tuple[int, int] | None = None  # the only queries that carry a tangent
    t_keys: tuple[int, int] | None = None
    scale: float | None = None
    softcap: float = 0.0
    layout: str = "bhld"  # bhld: contiguous; blhd: a transposed view; padded: rows with a gap
    seed: int = 0

    def __str__(self):
        base = f"B{self.B}H{self.H}.{self.Hk}L{self.L}S{self.S}D{self.D}"
        more = [f"Dv{self.Dv}"] if self.Dv else []
        more += ["causal"] if self.causal else []
        more += [f"window{self.window[0]}_{self.window[1]}"] if any_bound(self.window) else []
        for cu in self.packed or ():
            more += ["packed" + "_".join(map(str, cu))] if cu else []
        more += ["lower_right"] if self.lower_right else []
        more += ["blocks"] if self.blocks else []
        more += [self.mask] if self.mask else []
        more += [f"t_{self.tangents}"] if self.tangents != "qkvb" else []
        more += [f"rows{self.t_rows[0]}_{self.t_rows[1]}"] if self.t_rows else []
        more += [f"keys{self.t_keys[0]}_{self.t_keys[1]}"] if self.t_keys else []
        more += [f"drop{self.dropout_p}"] if self.dropout_p else []
        more += [f"scale{self.scale}"] if self.scale else []
        more += [f"softcap{self.softcap}"] if self.softcap else []
        more += [self.layout] if self.layout != "bhld" else []
        return "-".join([base, *more])


def any_bound(window) -> bool:
    return any(bound is not None for bound in window)


def visible(case: Case) -> Tensor:
    """(L, S), bool: the pairs that positions let attend, written out."""
    left, right = case.window
    cu_q, cu_k = case.packed or ((0, case.L), (0, case.S))
    cu_k = cu_q if cu_k is None else cu_k
    valid = torch.zeros(case.L, case.S, dtype=torch.bool)
    for n in range(len(cu_q) - 1):
        i = torch.arange(cu_q[n + 1] - cu_q[n])[:, None]
        j = torch.arange(cu_k[n + 1] - cu_k[n])[None, :]
        if case.lower_right:
            i = i + len(j[0]) - len(i)
        here = (j <= i) if case.causal else torch.ones(len(i), len(j[0]), dtype=torch.bool)
        if left is not None:
            here = here & (j >= i - left)
        if right is not None:
            here = here & (j <= i + right)
        valid[cu_q[n] : cu_q[n + 1], cu_k[n] : cu_k[n + 1]] = here
    if case.blocks is not None:
        rows, columns = case.block_sizes
        seen = torch.tensor(case.blocks).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        valid = valid & seen[: case.L, : case.S]
    return valid


@dataclass
class Problem:
    """The tensors of a case in one dtype on one device."""

    primals: list[Tensor | None]
    tangents: list[Tensor | None]
    seed: Tensor | None
    d_out: Tensor
    d_t_out: Tensor
    spec: Spec
    mask_grad: bool
    packed: tuple = ()  # the last fields of `Inputs`

    @property
    def x(self) -> Inputs:
        return Inputs(*self.primals, self.seed, *self.packed)

    @property
    def t(self) -> Tangents:
        return Tangents(*self.tangents)

    def double(self) -> "Problem":
        wide = lambda x: x.double() if x is not None and x.is_floating_point() else x  # noqa: E731
        return Problem(
            list(map(wide, self.primals)), list(map(wide, self.tangents)), self.seed,
            wide(self.d_out), wide(self.d_t_out), self.spec, self.mask_grad, self.packed,
        )  # fmt: skip


def build(case: Case, dtype: torch.dtype, device="cpu", backend="triton") -> Problem:
    """Draws N(0, 1) inputs, tangents and O(1) cotangents."""
    rng = torch.Generator(device).manual_seed(case.seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng, device=device).to(dtype)  # noqa: E731
    B, H, Hk, L, S, D = case.B, case.H, case.Hk, case.L, case.S, case.D
    Dv = case.Dv or D

    def tile(b, h, rows, d):
        if case.layout == "blhd":
            return draw(b, rows, h, d).transpose(1, 2)
        if case.layout == "padded":
            return draw(b, h, rows, d + 3)[..., :d]
        return draw(b, h, rows, d)

    q, k, v = tile(B, H, L, D), tile(B, Hk, S, D), tile(B, Hk, S, Dv)
    mask = None
    if case.mask == "bool":
        mask = torch.rand(1, H, L, S, generator=rng, device=device) > 0.4
        mask[:, :, 0] = False  # a fully masked row
    elif case.mask == "key":
        mask = draw(B, 1, 1, S)
    elif case.mask == "row":
        mask = draw(1, H, L, 1)
    elif case.mask == "full":
        mask = draw(B, H, L, S)
        mask[:, :, L // 2] = float("-inf")
    floating = mask is not None and mask.is_floating_point()
    tangents = [
        torch.randn(x.shape, generator=rng, device=device).to(dtype)
        if name in case.tangents
        else None
        for name, x in zip("qkv", (q, k, v), strict=True)
    ]
    tangents.append(draw(*mask.shape) if floating and "b" in case.tangents else None)
    seed = torch.tensor([2**40 + 7], device=device) if case.dropout_p else None
    scale = D**-0.5 if case.scale is None else case.scale
    spec = Spec(scale, case.causal, case.dropout_p, backend, *case.window, case.lower_right)
    spec = spec._replace(softcap=case.softcap)
    for name, pair in (("rows", case.t_rows), ("keys", case.t_keys)):
        if pair is not None:
            spec = spec._replace(**{f"t_{name}_start": pair[0], f"t_{name}_stop": pair[1]})
    packed = [
        None if cu is None else torch.tensor(cu, dtype=torch.int32, device=device)
        for cu in case.packed or ()
    ]
    if case.blocks is not None:
        blocks = block_mask(torch.tensor(case.blocks, device=device), 128)
        packed = [None, None, *blocks[:2]]
        spec = spec._replace(block_q=case.block_sizes[0], block_k=case.block_sizes[1])
    d_out, d_t_out = tile(B, H, L, Dv), tile(B, H, L, Dv)
    return Problem([q, k, v, mask], tangents, seed, d_out, d_t_out, spec, floating, tuple(packed))


class Exact:
    """The reference; of rows and keys without a tangent by what they are: it is zero there."""

    @staticmethod
    def forward(x, t, spec):
        saved = reference.forward(x, _cut(t, spec), spec)
        return saved if t is None else saved._replace(t_out=_inside(saved.t_out, spec, "rows"))

    @staticmethod
    def backward(d_out, d_t_out, x, t, saved, spec, mask_grad):
        d_t_out = _inside(d_t_out, spec, "rows")
        t = _cut(t, spec)
        first, second = reference.backward(d_out, d_t_out, x, t, saved, spec, mask_grad)
        return first, _cut(second, spec)


def _cut(t: Tangents | None, spec: Spec) -> Tangents | None:
    keys = () if t is None else (_inside(y, spec, "keys") for y in (t.k, t.v))
    return None if t is None else Tangents(_inside(t.q, spec, "rows"), *keys, t.mask)


def _inside(x: Tensor | None, spec: Spec, name: str) -> Tensor | None:
    """x (B, H, n, D), zero outside of the range of that name."""
    start, stop = getattr(spec, f"t_{name}_start"), getattr(spec, f"t_{name}_stop")
    if x is None or stop is None:
        return x
    kept = torch.zeros_like(x)
    kept[:, :, start:stop] = x[:, :, start:stop]
    return kept


def close(got: Tensor, exact: Tensor) -> None:
    """Equal up to round-off of float64."""
    torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)


def relative(x: Tensor, exact: Tensor, terms: float = 1.0) -> tuple[float, float]:
    """(squared error, squared scale). The scale is the norm of the exact tensor; where that is zero
    by cancellation, as the gradient of scores that have a single key, it is that of a sum of
    `terms` O(1) terms an element."""
    norm = float(exact.norm()) ** 2
    if norm <= 1e-12 * exact.numel():
        norm = exact.numel() * terms
    return float((x.double() - exact).norm()) ** 2, norm


def solve(implementation, p: Problem, stored: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor that an implementation's four functions return, by name; the backward passes get
    O and tO through dtype `stored`."""
    keep = lambda x: x if stored is None else x.to(stored).to(x.dtype)  # noqa: E731
    plain = implementation.forward(p.x, None, p.spec)
    how = (p.spec, p.mask_grad)
    kept = plain._replace(out=keep(plain.out))
    first, _ = implementation.backward(p.d_out, None, p.x, Tangents(), kept, *how)
    saved = implementation.forward(p.x, p.t, p.spec)
    saved = saved._replace(out=keep(saved.out), t_out=keep(saved.t_out))
    second = implementation.backward(p.d_out, p.d_t_out, p.x, p.t, saved, *how)
    only_tangent, _ = implementation.backward(None, p.d_t_out, p.x, p.t, saved, *how)
    names = {
        "out": plain.out,
        "out_of_jvp": saved.out,
        "t_out": saved.t_out,
        **dict(zip(("d_q", "d_k", "d_v", "d_mask"), first, strict=True)),
    }
    eight = ("q", "k", "v", "mask", "t_q", "t_k", "t_v", "t_mask")
    names |= {f"dd_{name}": x for name, x in zip(eight, (*second[0], *second[1]), strict=True)}
    names |= {f"dt_{name}": x for name, x in zip(eight[:4], only_tangent, strict=True)}
    return {name: x for name, x in names.items() if x is not None}


def errors(
    implementation, case: Case, dtype: torch.dtype, device="cpu", backend="triton", rows=128
) -> dict[str, float]:
    """Relative Frobenius error of every output by name, against the reference in float64 from the
    same inputs.

    A case of few query rows is drawn anew until `rows` are pooled: over six rows rounding alone
    scatters by half. Where the backward passes lose digits to cancellation, as with two keys of
    which one has all the weight, the scale is what exact passes lose from O and tO in `dtype`."""
    rounding = 0.21 * torch.finfo(dtype).eps  # of a tensor stored in dtype
    pooled: dict[str, list[float]] = {}
    for draw in range(max(1, rows // max(case.B * case.H * case.L, 1))):
        p = build(replace(case, seed=case.seed + 1000 * draw), dtype, device, backend)
        exact = solve(Exact, p.double())
        got = solve(implementation, p)
        lossy = None
        for name, x in exact.items():
            terms = {"q": case.S, "k": case.L, "v": case.L}.get(name[-1], case.B * case.H * case.L)
            square, norm = relative(got[name], x, terms)
            if square > tolerances.FIRST[dtype] ** 2 * norm:
                lossy = lossy or solve(Exact, p.double(), stored=dtype)
                loss = relative(lossy[name], x, terms)[0] / rounding**2
                norm = max(norm, min(loss, 30**2 * norm))  # a lost gradient still shows
            total = pooled.setdefault(name, [0.0, 0.0])
            total[0] += square
            total[1] += norm
    return {
        name: (square / norm) ** 0.5 if norm else square for name, (square, norm) in pooled.items()
    }


def check(found: dict[str, float], dtype: torch.dtype, slack: float = 1.0) -> None:
    """All outputs that miss their tolerance, reported together; `slack` for problems so small that
    rounding has no room to average out."""
    first, second = slack * tolerances.FIRST[dtype], slack * tolerances.SECOND[dtype]
    bad = {
        name: error
        for name, error in found.items()
        if not error <= (second if name.startswith(("dd_", "dt_")) else first)
    }
    assert not bad, f"beyond {first:.0e} (first order) or {second:.0e} (second order): {bad}"
