"""Lock-step: every arm at the same parameters, on the same batch, at every measured step.

A free run amplifies rounding: two correct attentions part ways. Here one arm, the baseline,
drives; at each measured step the others receive its parameters, and

    error(a) = ‖a - b‖ / ‖b‖    of u, du/dt, the loss, its gradient; of each attention's output
                                and its tangent; of the gradient of each block

is taken against the same in float64 (b is the truth, up to 1e-15) and against the baseline. The
first says how good a kernel is, the second how different. No arm can be asked for more than the
baseline's own error against float64.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.utils._pytree import tree_map_only

from training.attentions import sdpa
from training.build import build_data, build_module
from training.config_checks import precision
from training.module import GenerativeModule
from training.objectives.objective import Terms
from training.progress import tracked
from training.randomness import Draws, key
from training.strategies import HALVES
from training.validation import one_of, positive_integer

TRUTH = "float64"
SCALARS = ("loss", "unweighted error")  # their error may vanish by chance: shown, not judged
LayerTensors = dict[tuple[str, str], list[torch.Tensor]]  # (quantity, layer) -> its parts


class Recorder:
    """Stands where an objective's jvp is and keeps what it returned last."""

    def __init__(self, jvp: Any) -> None:
        self.jvp, self.value, self.tangent = jvp, None, None

    @property
    def mode(self) -> str:
        return self.jvp.mode

    def __call__(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.value, self.tangent = self.jvp(*args)
        return self.value, self.tangent

    def with_aux(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
        self.value, self.tangent, aux = self.jvp.with_aux(*args)
        return self.value, self.tangent, aux


@dataclass
class Arm:
    name: str
    module: GenerativeModule
    precision: str
    recorder: Recorder | None
    attentions: list[tuple[torch.Tensor, torch.Tensor]]  # (value, tangent) of the last evaluation

    def adopt(self, driver: GenerativeModule) -> None:
        """The driver's parameters, and its teachers'."""
        self.module.net.load_state_dict(driver.net.state_dict())
        self.module.objective.load_state_dict(driver.objective.state_dict())

    @contextlib.contextmanager
    def context(self, device: str) -> Iterator[None]:
        dtype = HALVES.get(self.precision)
        before = torch.get_default_dtype()
        if self.precision == "64-true":
            torch.set_default_dtype(torch.float64)
        try:
            with torch.autocast(device, dtype) if dtype else contextlib.nullcontext():
                yield
        finally:
            torch.set_default_dtype(before)

    def terms(self, sample: Any, seed: int, step: int, device: str) -> Terms:
        if self.precision == "64-true":
            sample = tree_map_only(
                torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, sample
            )
        self.attentions.clear()
        torch.manual_seed(key(seed, step, 0, "layers"))
        with self.context(device):
            return self.module.objective.loss(self.module.net, sample)

    def measure(self, sample: Any, seed: int, step: int, device: str) -> LayerTensors:
        """Every quantity at the present parameters; gradients are left at None."""
        terms = self.terms(sample, seed, step, device)
        terms.loss.backward()
        found: LayerTensors = {
            (SCALARS[0], ""): [terms.loss.detach()],
            (SCALARS[1], ""): [terms.metrics["error"]],
        }
        if self.recorder is not None and self.recorder.tangent is not None:
            found["u", ""] = [self.recorder.value.detach()]  # type: ignore[attr-defined]
            found["du/dt", ""] = [self.recorder.tangent.detach()]
        for i, (value, tangent) in enumerate(self.attentions[: len(_attentions(self.module.net))]):
            found["attention", f"{i:02d}"], found["its tangent", f"{i:02d}"] = [value], [tangent]
        for name, parameter in self.module.net.named_parameters():
            if parameter.grad is not None:
                found.setdefault(("gradient", ""), []).append(parameter.grad)
                if name.startswith("blocks."):
                    layer = name.split(".")[1].zfill(2)
                    found.setdefault(("block gradient", layer), []).append(parameter.grad)
        self.module.zero_grad(set_to_none=True)
        return found


def _attentions(net: nn.Module) -> list[nn.Module]:
    """Modules that were given an attention function."""
    return [m for m in net.modules() if callable(f := getattr(m, "attention", None))
            and not isinstance(f, nn.Module)]  # fmt: skip


def _record_attentions(net: nn.Module, into: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    unpack = torch.autograd.forward_ad.unpack_dual

    def recording(attention: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = attention(*args, **kwargs)
            value, tangent = unpack(out)
            if tangent is not None:  # only evaluations inside the jvp
                into.append((_plain(value), _plain(tangent)))
            return out

        return run

    for module in _attentions(net):
        module.attention = recording(module.attention)  # type: ignore[assignment]


def _plain(x: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor inside ``torch.func.jvp``, outside of it."""
    return torch.func.debug_unwrap(x.detach(), recurse=True).detach().clone()


def _arm(name: str, config: DictConfig, data: Any, device: str) -> Arm:
    given = precision(config.trainer)
    one_of("trainer.precision", given, ("32-true", "64-true", "bf16-mixed"))
    module = build_module(config, data).to(device)
    if given == "64-true":
        module.double()
    module.objective.on_fit_start(next(module.net.parameters()))
    recorder = None
    if getattr(module.objective, "jvp", None) is not None:
        recorder = module.objective.jvp = Recorder(module.objective.jvp)  # type: ignore[assignment]
    arm = Arm(name, module, given, recorder, [])
    _record_attentions(module.net, arm.attentions)
    return arm


def _truth(config: DictConfig, data: Any, device: str) -> Arm:
    """The same in float64, with PyTorch's own attention."""
    config = copy.deepcopy(config)
    config.trainer.precision = "64-true"
    arm = _arm(TRUTH, config, data, device)
    for module in _attentions(arm.module.net):
        module.attention = sdpa  # type: ignore[assignment]
    _record_attentions(arm.module.net, arm.attentions)
    return arm


def error(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """‖a - b‖ / ‖b‖ over all parts, in float64."""
    off = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    size = sum(float(y.double().square().sum()) for y in b)
    return (off / size) ** 0.5 if size else float(off > 0)


def lockstep(
    configs: dict[str, DictConfig], baseline: str, steps: int, every: int, device: str
) -> list[dict[str, Any]]:
    """Rows {step, arm, against, quantity, layer, error} of every arm against float64 and against
    the baseline, whose own optimizer drives ``steps`` steps of its own run.
    """
    positive_integer("comparison.lockstep.steps", steps)
    positive_integer("comparison.lockstep.every", every)
    config = configs[baseline]
    data = build_data(config)
    arms = [_arm(name, other, data, device) for name, other in configs.items()]
    arms.sort(key=lambda arm: arm.name != baseline)
    truth, driver = _truth(config, data, device), _arm(baseline, config, data, device)
    module = driver.module
    optimizer, scheduler = module.optimizer(module.net.parameters(), config.trainer.max_steps)
    rows: list[dict[str, Any]] = []
    batches = tracked(islice(data.train_dataloader(), steps), "lock-step", steps)
    for step, (x, y) in enumerate(batches):
        x, y = x.to(device), y.to(device)
        draws = Draws(config.seed, step, device=device)
        sample = module.objective.sample(x, y, module.net.null_label, draws)  # type: ignore[arg-type]
        # At the initial weights the output and its derivative are exactly 0: nothing to compare.
        if (step + 1) % every == 0:
            where = (sample, config.seed, step, device)
            truth.adopt(module)
            exact, base = truth.measure(*where), None
            for arm in arms:
                arm.adopt(module)
                mine = arm.measure(*where)
                base = base or mine
                for against, other in ((TRUTH, exact), (baseline, base)):
                    rows += [
                        {
                            "step": step,
                            "arm": arm.name,
                            "against": against,
                            "quantity": quantity,
                            "layer": layer,
                            "error": error(parts, other[quantity, layer]),
                        }
                        for (quantity, layer), parts in mine.items()
                        if (quantity, layer) in other and (arm.name, against) != (baseline,) * 2
                    ]
        driver.terms(sample, config.seed, step, device).loss.backward()
        if largest := config.trainer.gradient_clip_val:
            nn.utils.clip_grad_norm_(module.net.parameters(), largest)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        module.objective.after_step(module.net)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and largest error of every arm and quantity, over steps and layers."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["quantity"], row["arm"], row["against"]), []).append(row["error"])
    return [
        {
            "quantity": quantity,
            "arm": arm,
            "against": against,
            "median": float(torch.tensor(errors, dtype=torch.float64).median()),
            "largest": max(errors),
        }
        for (quantity, arm, against), errors in groups.items()
    ]


def verdict(rows: list[dict[str, Any]], candidate: str, baseline: str, factor: float) -> dict:
    """Whether the candidate is as near to float64 as the baseline, up to ``factor``."""
    medians = {
        (row["quantity"], row["arm"]): row["median"]
        for row in summary(rows)
        if row["against"] == TRUTH
    }
    ratios = {
        quantity: medians[quantity, candidate] / medians[quantity, baseline]
        for quantity, arm in medians
        if arm == candidate and quantity not in SCALARS and medians.get((quantity, baseline))
    }
    if not ratios:
        return {"ratios": {}, "passed": None, "words": "No verdict: nothing was measured."}
    worst = max(ratios, key=lambda quantity: ratios[quantity])
    passed = ratios[worst] <= factor
    words = (
        f"{'As accurate' if passed else 'Less accurate'}: against float64 the error of {candidate}"
        f" is at most {ratios[worst]:.2f} times that of {baseline} ({worst}; allowed are"
        f" {factor:g} times)."
    )
    return {"ratios": ratios, "factor": factor, "passed": passed, "words": words}
