"""Weights & Biases, imported only where it is configured."""

import secrets
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

STEP = "trainer/global_step"


def wandb_logger(
    directory: str,
    offline: bool,
    project: str = "flash-jvp",
    name: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
) -> Logger | None:
    """A W&B logger; ``offline`` needs neither account nor network and writes to
    ``directory/wandb``. Runs that are compared share a ``group``; ``job_type`` is their attention.
    A run that is resumed in its directory goes on under the same id, which ``wandb/id`` keeps:
    offline, `wandb sync --append` uploads its parts as one.

    None on other ranks than 0. Where the package is missing, offline logging is left out with a
    warning (metrics.csv has everything) and online logging raises.
    """
    if rank_zero_only.rank != 0:
        return None
    if find_spec("wandb") is None:
        if offline:
            rank_zero_warn("wandb is not installed: logging to metrics.csv only")
            return None
        raise ModuleNotFoundError("logger=wandb needs the package wandb: pip install wandb")
    import wandb

    kept = Path(directory) / "wandb" / "id"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(f"{secrets.token_hex(4)}\n")
    run = wandb.init(
        project=project,
        name=name,
        group=group,
        job_type=job_type,
        dir=directory,
        id=kept.read_text().strip(),
        resume=None if offline else "allow",
        mode="offline" if offline else "online",
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    return WandbLogger(experiment=run)
