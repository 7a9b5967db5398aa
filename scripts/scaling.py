"""What several GPUs give: images/s a GPU and peak memory of one GPU, DDP and FSDP2, and their loss
curves on the same global batches. Starts its own processes, one a GPU.

python scripts/scaling.py --output scaling.json
python scripts/scaling.py --gpus 1 2 4 8 --models dit_xl2=64 --curve 0 --plot scaling.png
python scripts/scaling.py --gpus 1 2 4 8 --models dit_xl2=256 --strong --curve 0

The step is that of training: MeanFlow (``data_proportion`` 0.75), bf16-mixed, blocks compiled,
AdamW. Arms:

    one            each GPU trains a network of its own, without CUDA graphs
    one, graphs    as a CUDA graph (not on a CPU)
    ddp            all GPUs train one network, whole in each (DistributedDataParallel)
    ddp, graphs    the same as a CUDA graph, which holds the exchange of gradients
    fsdp           in shards (FSDP2)
    fsdp, graphs   the same as a CUDA graph, which holds the travels of weights and gradients
    hybrid         two copies, each in shards of its own (four processes at least)
    hybrid, graphs the same as a CUDA graph

A curve of ``one`` accumulates the gradients of all batches that ddp and fsdp have on their GPUs.
Each row has the milliseconds a step in which the processes send each other something, and those in
which nothing else runs meanwhile (``exposed_ms``). Several numbers of GPUs are one run each, and
the picture shows images/s a GPU relative to the least number. ``--strong`` deals the images out:
the number behind a model is that of all GPUs.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from training.activation_checkpointing import checkpoint_blocks
from training.arguments import CONFIGS
from training.build import build_data, build_net
from training.distributed import SummedGradients
from training.environment import environment
from training.metrics.profile import profile_steps
from training.randomness import Draws, generator
from training.renamed import command_line
from training.sharding import shard
from training.step import Step
from training.strategies import HALVES

SEED = 0
ARMS = (
    "one",
    "one, graphs",
    "ddp",
    "ddp, graphs",
    "fsdp",
    "fsdp, graphs",
    "hybrid",
    "hybrid, graphs",
)
CURVES = ("one", *ARMS[2:])


class Loss(nn.Module):
    """What DDP wraps: a step's loss and its unweighted error as a forward."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.net, self.step = step.net, step

    def forward(self, sample: Any) -> tuple[torch.Tensor, torch.Tensor]:
        terms = self.step(sample)
        return terms.loss, terms.metrics["error"]


class Arm:
    """A network that is trained in one of the ways of ``ARMS``."""

    def __init__(self, kind: str, config: Any, device: torch.device) -> None:
        self.device, self.world = device, distributed.get_world_size()
        self.data = build_data(config)
        torch.manual_seed(SEED)
        with device:
            net = build_net(config, self.data.shape, self.data.num_classes)
        self.objective = instantiate(config.objective)
        self.objective.setup(net)
        checkpoint_blocks(net, config.checkpointing)
        self.half = HALVES.get(config.trainer.precision)
        if kind.startswith(("fsdp", "hybrid")):
            shape = (2, self.world // 2) if kind.startswith("hybrid") else (self.world,)
            names = ("replicate", "shard")[-len(shape) :]
            shard(net, init_device_mesh(device.type, shape, mesh_dim_names=names), self.half)
        else:
            net.to(device)
        self.step = Step(net, self.objective, bool(config.compile), "graphs" in kind)
        self.step.prepare(self.half)
        if kind == "ddp, graphs":
            self.step.exchange = SummedGradients(net)
        self.loss: nn.Module = Loss(self.step)
        if kind == "ddp":
            self.loss = DistributedDataParallel(
                self.loss,
                [device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )
        lr = config.optimizer.lr
        self.optimizer = torch.optim.AdamW(net.parameters(), lr, (0.9, 0.95), fused=True)

    def sample(self, batch: int, step: int, rank: int) -> Any:
        draws = Draws(SEED, step, rank, self.world, self.device, alike=True)  # of every kind
        images = self.data.draw(batch, generator(SEED, step, rank, "data"))  # on the CPU
        x, y = (part.to(self.device) for part in images)
        null: int = self.step.net.null_label  # type: ignore[assignment]
        return self.objective.sample(x, y, null, draws)

    def __call__(self, samples: list[Any]) -> torch.Tensor:
        """A step of the optimizer on the mean of the samples' losses; that and the mean of their
        errors, (2,).
        """
        total = torch.zeros(2, device=self.device)
        self.step.accumulate = len(samples)
        for sample in samples:
            with self.autocast():
                loss, error = self.loss(sample)
            self.step.backward(loss / len(samples))
            total += torch.stack([loss.detach(), error]) / len(samples)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half is not None)  # type: ignore[return-value]


def measure(kind: str, config: Any, device: torch.device, batch: int, steps: int) -> dict[str, Any]:
    """Time of a step, the slowest process's, and the most memory that one took."""
    begun = time.perf_counter()
    arm = Arm(kind, config, device)
    samples = [arm.sample(batch, 0, distributed.get_rank())]
    for _ in range(4):  # the first one compiles, a graph is recorded in the second one
        arm(samples)
    wait(device)
    ready = time.perf_counter() - begun
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    distributed.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        arm(samples)
    wait(device)
    seconds = (time.perf_counter() - start) / steps
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    sent = exposed = 0.0
    if device.type == "cuda":
        found = profile_steps(lambda: arm(samples), 4)
        sent, exposed = found.kinds["communication"], found.exposed
    arm.step.release()
    seconds, memory, ready, sent, exposed = worst(device, seconds, memory, ready, sent, exposed)
    return {
        "batch": batch,
        "step_ms": round(1000 * seconds, 3),
        "images_per_s_per_gpu": round(batch / seconds, 2),
        "communication_ms": round(sent, 3),
        "exposed_ms": round(exposed, 3),
        "peak_mib": round(memory / 2**20),
        "ready_s": round(ready, 1),
    }


def curve(
    kind: str, config: Any, device: torch.device, batch: int, steps: int
) -> list[list[float]]:
    """Loss and unweighted error of each step, means over its global batch. (2, steps)"""
    arm, rank = Arm(kind, config, device), distributed.get_rank()
    ranks = range(arm.world) if kind == "one" else [rank]
    rows = [arm([arm.sample(batch, i, r) for r in ranks]) for i in range(steps)]
    arm.step.release()
    losses = torch.stack(rows, dim=1)
    if kind != "one":
        distributed.all_reduce(losses)
        losses /= arm.world
    return losses.tolist()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def worst(device: torch.device, *values: float) -> list[float]:
    numbers = torch.tensor(values, device=device, dtype=torch.float64)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return numbers.tolist()


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def possible(kind: str, cuda: bool) -> bool:
    hybrid = distributed.get_world_size() >= 4 and distributed.get_world_size() % 2 == 0
    return (cuda or "graphs" not in kind) and (hybrid or not kind.startswith("hybrid"))


def configured(options: argparse.Namespace, model: str) -> Any:
    chosen = [
        f"model={model}",
        "objective=meanflow",
        "objective.data_proportion=0.75",
        "data=blobs",
    ]
    chosen += ["data.channels=4", "data.num_classes=1000", "trainer.precision=bf16-mixed"]
    chosen += ["optimizer.lr=1e-4", f"compile={'false' if options.eager else 'true'}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [*chosen, *command_line(options.set)])


def work(options: argparse.Namespace) -> None:
    """One process of several."""
    local, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        if options.gib is not None:
            whole = torch.cuda.get_device_properties(device).total_memory / 2**30
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.gib / whole))
    distributed.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    first = distributed.get_rank() == 0
    result: dict[str, Any] = {
        "environment": environment(),
        "gpus": distributed.get_world_size(),
        "compile": not options.eager,
        "set": options.set,
        "strong": options.strong,
        "gib": options.gib,
        "arms": {},
        "curves": {},
    }
    for model, images in options.models:
        batch = images // distributed.get_world_size() if options.strong else images
        config = configured(options, model)
        kinds = [kind for kind in options.arms or ARMS if possible(kind, cuda)]
        for kind in kinds:
            try:
                row = measure(kind, config, device, batch, options.steps)
            except torch.OutOfMemoryError:  # of all processes alike
                row = {"batch": batch, "out_of_memory": True}
            free(device)
            result["arms"].setdefault(model, {})[kind] = row
            if first:
                print(f"{model} {kind}: {row}", flush=True)
                write(options.output, result)
        if options.curve and model == options.models[0][0]:
            result["curves"] = {"model": model, "batch": batch * distributed.get_world_size()}
            result["curves"] |= {"loss": {}, "error": {}}
            for kind in [kind for kind in CURVES if kind in kinds]:
                losses, errors = curve(kind, config, device, batch, options.curve)
                free(device)
                result["curves"]["loss"][kind] = losses
                result["curves"]["error"][kind] = errors
                if first:
                    write(options.output, result)
    if first:
        print(table(result))
        print(options.output)
    distributed.destroy_process_group()


def write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


def table(result: dict[str, Any]) -> str:
    lines = [f"{'model':10s} {'':12s} images/s a GPU   of one   MiB a GPU"]
    for model, arms in result["arms"].items():
        speeds = [row["images_per_s_per_gpu"] for row in arms.values() if "step_ms" in row]
        alone = speeds[0] if speeds else 1.0
        for kind, row in arms.items():
            if "out_of_memory" in row:
                lines.append(f"{model:10s} {kind:12s} out of memory")
                continue
            speed = row["images_per_s_per_gpu"]
            lines.append(
                f"{model:10s} {kind:12s} {speed:14.1f} {speed / alone:8.3f} {row['peak_mib']:11d}"
            )
    errors = result["curves"].get("error", {})  # the weighted loss is about 1 whatever happens
    for kind in errors.keys() - {"one"} if "one" in errors else ():
        pairs = zip(errors[kind], errors["one"], strict=True)
        apart = max(abs(a - b) / abs(b) for a, b in pairs)
        steps = len(errors[kind])
        lines.append(f"error of {kind} and of one GPU, {steps} steps: at most {apart:.2e} apart")
    return "\n".join(lines)


def model_and_batch(text: str) -> tuple[str, int]:
    model, _, batch = text.partition("=")
    if not batch.isdigit() or int(batch) < 1:
        raise argparse.ArgumentTypeError(f"must be MODEL=IMAGES_A_GPU, as dit_b2=128; got {text}")
    return model, int(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description="images/s, memory and loss of several GPUs")
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[torch.cuda.device_count() or 2], help="processes")
    add("--models", nargs="+", type=model_and_batch, default=[("dit_b2", 128), ("dit_xl2", 64)])
    add("--arms", nargs="+", choices=ARMS, default=None, help="some of them")
    add("--steps", type=int, default=15, help="that are timed")
    add("--curve", type=int, default=100, help="steps of the loss curves of the first model")
    add("--gib", type=float, default=None, help="memory of a GPU that may be used")
    add("--strong", action="store_true", help="the images of a model are those of all GPUs")
    add("--plot", type=Path, default=None, help="picture of several numbers of GPUs")
    add("--eager", action="store_true", help="do not compile")
    add("--set", nargs="*", default=[], help="keys of train.py: model.depth=2 data.tokens=1024")
    add("--output", type=Path, default=Path("scaling.json"))
    options = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        return work(options)
    if options.strong:
        for model, images in options.models:
            if wrong := [n for n in options.gpus if images % n]:
                parser.error(f"--strong deals out {model}={images}: not to {wrong[0]} GPUs")
    if len(options.gpus) == 1:
        if options.plot is not None:
            parser.error("--plot needs several numbers of --gpus, as 1 2")
        sys.exit(start(options.gpus[0], sys.argv[1:]))
    runs = {}
    for number in options.gpus:
        path = options.output.with_suffix(f".{number}.json")
        if code := start(number, [*sys.argv[1:], "--output", str(path)]):
            sys.exit(code)
        runs[str(number)] = json.loads(path.read_text())
        write(options.output, {"runs": runs})
        path.unlink()
    print(together(runs))
    if options.plot is not None:
        draw(runs, options.plot)
        print(options.plot)
    print(options.output)


def start(gpus: int, arguments: list[str]) -> int:
    """This script in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={gpus}", __file__, *arguments]
    return subprocess.run(launcher).returncode


def efficiencies(runs: dict[str, Any]) -> dict[tuple[str, str], dict[int, float]]:
    """Images/s a GPU of each model's arms, relative to the best that the least number of GPUs
    reaches, by training networks of their own if it did, by the number of GPUs.
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    least = runs[min(runs, key=int)]["arms"]
    for number, run in runs.items():
        for model, arms in run["arms"].items():
            rates = {k: r.get("images_per_s_per_gpu", 0.0) for k, r in least[model].items()}
            alone = [rate for k, rate in rates.items() if k.startswith("one") and rate]
            best = max(alone or rates.values(), default=0.0)
            for kind, row in arms.items():
                if "images_per_s_per_gpu" in row and best:
                    share = row["images_per_s_per_gpu"] / best
                    found.setdefault((model, kind), {})[int(number)] = share
    return found


def together(runs: dict[str, Any]) -> str:
    """A Markdown table: of each arm the share of one GPU's rate, by the number of GPUs."""
    numbers = sorted(map(int, runs))
    lines = ["| model | arm | " + " | ".join(f"GPUs: {n}" for n in numbers) + " |"]
    lines.append("|" + "---|" * (2 + len(numbers)))
    for (model, kind), shares in efficiencies(runs).items():
        cells = [f"{shares[n]:.3f}" if n in shares else "" for n in numbers]
        lines.append("| " + " | ".join([model, kind, *cells]) + " |")
    return "\n".join(lines)


def draw(runs: dict[str, Any], path: Path) -> None:
    """The same as lines, a panel a model."""
    import matplotlib.pyplot as plt

    shares = efficiencies(runs)
    models = list(dict.fromkeys(model for model, _ in shares))
    if not models:
        return
    figure, panels = plt.subplots(
        1, len(models), figsize=(4.2 * len(models), 3.4), sharey=True, squeeze=False
    )
    for panel, model in zip(panels[0], models, strict=True):
        for (of, kind), values in shares.items():
            if of == model:
                numbers = sorted(values)
                panel.plot(numbers, [values[n] for n in numbers], marker="o", label=kind)
        panel.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
        panel.set_xscale("log", base=2)
        ticks = sorted(map(int, runs))
        panel.set_xticks(ticks, [str(n) for n in ticks])
        panel.set(title=model, xlabel="GPUs")
    least = min(share for values in shares.values() for share in values.values())
    panels[0][0].set(ylabel="images/s a GPU, of one GPU", ylim=(0.8 if least > 0.8 else 0, 1.05))
    panels[0][-1].legend(fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
