"""A comparison as a W&B run beside those of its arms: group = pair, job_type = comparison."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from training.comparison.files import Found, finite
from training.document import Judgement, Table


def log_comparison(found: Found, config: DictConfig, output: Path) -> None:
    """Verdicts, tables, plots and the page, where the configuration has a W&B logger."""
    options = config.logger.get("wandb") if config.logger else None
    if not options or find_spec("wandb") is None:
        return
    import wandb

    run = wandb.init(
        project=options.project,
        name=found.title,
        group=found.results["pair"],
        job_type="comparison",
        dir=str(output),
        mode="offline" if options.offline else "online",
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.log(contents(found, wandb))
    run.summary.update(_numbers("comparison", finite(found.results)))
    shutil.copy(output / "report.html", Path(run.dir) / "report.html")
    run.save(str(Path(run.dir) / "report.html"), policy="now")
    run.finish()


def contents(found: Found, wandb: Any) -> dict[str, Any]:
    """What is logged: comparison/NAME for every table, picture and verdict."""
    logged: dict[str, Any] = {
        f"comparison/{name}": wandb.Image(str(path)) for name, path in found.pictures.items()
    }
    tables = [block for block in found.blocks if isinstance(block, Table)]
    for i, block in enumerate(tables):
        rows = [["" if v is None else str(v) for v in row] for row in block.rows]
        logged[f"comparison/table_{i}"] = wandb.Table(columns=list(block.columns), data=rows)
    verdicts = [[b.title, str(b.passed), b.text] for b in found.blocks if isinstance(b, Judgement)]
    logged["comparison/verdicts"] = wandb.Table(
        columns=["verdict", "passed", "words"], data=verdicts
    )
    return logged


def _numbers(prefix: str, value: Any) -> dict[str, float | str | bool]:
    """Scalars of nested results, by their path."""
    if isinstance(value, dict):
        parts = [_numbers(f"{prefix}/{name}", inner) for name, inner in value.items()]
        return {k: v for part in parts for k, v in part.items()}
    return {prefix: value} if isinstance(value, bool | int | float | str) else {}
