"""The arms of a comparison: configurations that differ in what is compared and in nothing else, the
runs they become, and the proof that they saw the same.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from torch.utils._pytree import tree_leaves

from training.build import build_data, build_module, settle_batch
from training.callbacks.fingerprint import digest
from training.config_checks import check
from training.randomness import Draws
from training.registry import stored, trust_own

Compose = Callable[[Sequence[str]], DictConfig]  # overrides -> configuration of a run
RUN_DIR = "${hydra:runtime.output_dir}"
REPEAT = " again"  # the baseline once more: the A/A arm

# What arms may differ in; the rest of their configurations must agree.
MAY_DIFFER = (
    "attention",
    "model.attention",
    "seed",
    "compile",
    "cuda_graphs",
    "trainer.precision",
    "objective.jvp",
    "checkpointing",
    "lock_wait",
    "trusted",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "callbacks",
    "logger",
    "ckpt_path",
    "runs",
    "comparison",
)


@dataclass(frozen=True)
class Run:
    """A finished run of scripts/train.py, as read from its directory."""

    arm: str
    directory: Path
    config: DictConfig
    steps: np.ndarray  # (n,)
    metrics: dict[str, np.ndarray]  # name -> (n,), NaN where a row lacks it
    summary: dict[str, Any]
    fingerprint: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def plan(comparison: DictConfig, first_seed: int) -> list[tuple[str, int, list[str]]]:
    """(arm, seed, overrides) of every run: candidate and baseline with each seed, everything else,
    and the baseline again, with the first one.
    """
    arms = {name: list(overrides) for name, overrides in comparison.arms.items() if overrides}
    pair = (comparison.baseline, comparison.candidate)
    for key, name in zip(("baseline", "candidate"), pair, strict=True):
        if name not in arms:
            raise ValueError(f"comparison.{key} must be one of {', '.join(arms)}; got {name!r}")
    seeds = range(first_seed, first_seed + comparison.seeds)
    runs = [(name, seed, arms[name]) for seed in seeds for name in pair]
    again = comparison.baseline + REPEAT
    runs.append((again, first_seed, arms[comparison.baseline]))
    return runs + [(name, first_seed, arms[name]) for name in arms if name not in pair]


def check_arms(compose: Compose, arms: Sequence[tuple[str, list[str]]]) -> None:
    """Raise before anything is trained where an arm would fail later: all of them are composed,
    checked and built, without memory for their weights.
    """
    data: dict[str, Any] = {}
    for arm, overrides in {name: list(more) for name, more in arms}.items():
        config = compose(overrides)
        config.init_from = None  # read when it is trained
        key = json.dumps(OmegaConf.to_container(config.data, resolve=True), default=str)
        try:
            check(config)
            settle_batch(config)
            if key not in data:
                data[key] = build_data(config)
            with torch.device("meta"):
                build_module(config, data[key])
        except (ValueError, TypeError, NotImplementedError, HydraException) as error:
            cause = error.__cause__ if isinstance(error, InstantiationException) else None
            raise ValueError(f"arm {arm} ({' '.join(overrides)}): {cause or error}") from error


def placed(config: DictConfig, directory: Path) -> DictConfig:
    """The configuration with everything that it writes in ``directory``."""
    text = OmegaConf.to_yaml(config).replace(RUN_DIR, str(directory))
    return OmegaConf.create(text)  # type: ignore[return-value]


def run_config(
    compose: Compose, arm: str, seed: int, overrides: list[str], directory: Path, pair_id: str
) -> DictConfig:
    """What scripts/train.py is given for one run."""
    config = placed(compose([*overrides, f"seed={seed}"]), directory)
    trust_own(config)  # it is read again when the run is done
    config.ckpt_path = "auto"  # a comparison that was interrupted goes on
    config.callbacks.fingerprint = {
        "_target_": "training.callbacks.fingerprint.Fingerprint",
        "directory": str(directory),
        "every_n_steps": config.comparison.fingerprint_every_n_steps,
    }
    if config.logger.get("wandb"):
        names = {"group": pair_id, "job_type": arm, "name": f"{arm}, seed {seed}"}
        config.logger.wandb.update(names)
    return config


def pair_id(config: DictConfig, kind: str) -> str:
    """A name for everything that the arms share; for a finished run, that under which it logged."""
    if named := OmegaConf.select(config, "logger.wandb.group"):
        return named
    shared = json.dumps(_shared(config), sort_keys=True, default=str)
    tensor = torch.frombuffer(bytearray(shared.encode()), dtype=torch.uint8)
    return f"{kind}-{digest([tensor])[:8]}"


def read_run(directory: Path, arm: str | None = None) -> Run:
    """A run directory of scripts/train.py; ``arm`` None is named after its attention."""
    for name in ("config.yaml", "metrics.csv"):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"runs: {directory} has no {name}; give run directories of scripts/train.py"
            )
    config = stored(directory / "config.yaml")
    with (directory / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in (rows[0] if rows else {}) if name != "step"]
    if "train/error" not in names:
        raise ValueError(f"runs: {directory}/metrics.csv has no column train/error")
    rows = [row for row in rows if row["train/error"]]
    metrics = {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    summary = directory / "summary.json"
    return Run(
        arm or attention_name(config),
        directory,
        config,
        np.array([int(row["step"]) for row in rows]),
        metrics,
        json.loads(summary.read_text()) if summary.is_file() else {},
        read_fingerprint(directory),
    )


def read_fingerprint(directory: Path) -> dict[str, Any]:
    """{"weights": hash, "batches": {step: hash}} as recorded, or nothing."""
    path = directory / "fingerprint.jsonl"
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found: dict[str, Any] = {"batches": {r["step"]: r["batch"] for r in rows if "step" in r}}
    return found | {k: v for row in rows if "weights" in row for k, v in row.items()}


def recompute_fingerprint(config: DictConfig, batches: int = 4) -> dict[str, Any]:
    """What a run of this configuration starts from and is fed, on this machine's CPU."""
    data = build_data(config)
    module = build_module(config, data)
    found = {"weights": digest(module.net.state_dict().values()), "batches": {}}
    for step, (x, y) in enumerate(islice(data.train_dataloader(), batches)):
        draws = Draws(config.seed, step)
        sample = module.objective.sample(x, y, module.net.null_label, draws)  # type: ignore[arg-type]
        tensors = [t for t in tree_leaves(((x, y), sample)) if isinstance(t, torch.Tensor)]
        found["batches"][step] = digest(tensors)
    return found


def attention_name(config: DictConfig) -> str:
    target, backend = config.attention["_target_"], config.attention.get("backend")
    if target.startswith("training.attentions."):
        return target.rsplit(".", 1)[1]
    return "jvp" if backend is None else backend


def name_arms(runs: Sequence[Run]) -> list[Run]:
    """Runs that were found, not planned: named after their attention and what else is not as in
    most of them; a second one of the same kind and seed is the A/A arm.
    """
    keys = ("trainer.precision", "objective.jvp.mode", "compile")
    values = {key: [OmegaConf.select(run.config, key) for run in runs] for key in keys}
    usual = {key: max(found, key=found.count) for key, found in values.items()}
    named: list[Run] = []
    for run in runs:
        arm = run.arm
        for key in keys:
            if (mine := OmegaConf.select(run.config, key)) != usual[key]:
                arm += f" {key.rsplit('.', 1)[1]}={mine}"
        if any((other.arm, other.seed) == (arm, run.seed) for other in named):
            arm += REPEAT
        named.append(replace(run, arm=arm))
    return named


def _shared(config: DictConfig) -> Any:
    whole = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    plain = OmegaConf.to_container(whole, resolve=False)
    return _without(plain, "")


def _without(value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {k: (f"{path}.{k}" if path else str(k)) for k in value}
    return {k: _without(value[k], p) for k, p in inner.items() if p not in MAY_DIFFER}


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    found = {}
    for k, v in value.items():
        found |= _leaves(v, f"{path}.{k}" if path else str(k))
    return found


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise ``ValueError`` where two runs differ in more than they may, or share no step."""
    first = runs[0]
    mine = _leaves(_shared(first.config))
    for run in runs[1:]:
        theirs = _leaves(_shared(run.config))
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                raise ValueError(
                    f"{first.directory} and {run.directory} cannot be compared: {key} is"
                    f" {mine.get(key)!r} in one and {theirs.get(key)!r} in the other"
                )
        if not np.intersect1d(first.steps, run.steps).size:
            raise ValueError(f"{first.directory} and {run.directory} logged no step in common")


def check_fingerprints(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each run: its hashes and whether runs of its seed agree with it.

    Recorded hashes are compared with each other; a run that recorded none is recomputed from its
    configuration, and then so is what it is compared with.
    """
    groups: dict[int, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.seed, []).append(run)
    rows = []
    for group in groups.values():
        recorded = all(run.fingerprint for run in group)
        prints = [
            run.fingerprint if recorded else recompute_fingerprint(run.config) for run in group
        ]
        for run, mine in zip(group, prints, strict=True):
            common = mine["batches"].keys() & prints[0]["batches"].keys()
            rows.append(
                {
                    "arm": run.arm,
                    "seed": run.seed,
                    "source": "recorded" if recorded else "recomputed",
                    "weights": mine.get("weights"),
                    "batches": len(common),
                    "same_weights": mine.get("weights") == prints[0].get("weights"),
                    "same_batches": bool(common)
                    and all(mine["batches"][s] == prints[0]["batches"][s] for s in common),
                }
            )
    return rows
