"""Compare two attentions: ``python scripts/compare.py experiment=loss_matching`` (or
``speed_matching``, or ``runs=[RUN,RUN]``) writes a report; docs/comparison.md says how to read it.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from training.cli import one_line_errors, run
from training.renamed import command_line, composed


def compare(config: DictConfig, overrides: Sequence[str], output: Path) -> Path:
    """Returns the path of the page."""
    # Torch, Lightning and Matplotlib take seconds: after the keys.
    from training.comparison.files import write_report
    from training.comparison.loss import compare_losses
    from training.comparison.speed_report import compare_speeds
    from training.comparison.wandb import log_comparison
    from training.environment import environment
    from training.fit import train
    from training.registry import trust
    from training.validation import one_of

    one_of("comparison.kind", config.comparison.kind, ("loss", "speed"))
    trust(config.trusted)

    @cache  # a quarter of a second each, and every arm is asked for again and again
    def once(*more: str) -> DictConfig:
        whole = [*overrides, *command_line(more)]
        return composed(hydra.compose("compare", whole), whole)

    def compose(more: Sequence[str]) -> DictConfig:
        return deepcopy(once(*more))

    if config.comparison.kind == "speed":
        found = compare_speeds(config, compose, output)
    else:
        found = compare_losses(config, compose, train, output)
    page = write_report(found, environment(), overrides, output)
    log_comparison(found, config, output)
    return page


@hydra.main(version_base="1.3", config_path="../configs", config_name="compare")
def main(config: DictConfig) -> None:
    with one_line_errors():
        hydra_config = HydraConfig.get()
        output = Path(hydra_config.runtime.output_dir)
        overrides = list(hydra_config.overrides.task)
        page = compare(composed(config, overrides), overrides, output)
        print(page.with_suffix(".md").read_text().split("\n## ")[1])
        print(page)


if __name__ == "__main__":
    run(main)
