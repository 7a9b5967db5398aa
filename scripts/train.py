"""Train: ``python scripts/train.py attention=jvp``; ``--help`` lists the choices."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from training.cli import one_line_errors, run
from training.renamed import composed
from training.resuming import directory, resumed


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    with one_line_errors():
        hydra_config = HydraConfig.get()
        if "comparison" in config:
            chosen = f"experiment={hydra_config.runtime.choices.get('experiment')}"
            raise ValueError(
                f"{chosen} is scripts/compare.py's; run python scripts/compare.py {chosen}"
            )
        overrides = list(hydra_config.overrides.task)
        config = composed(config, overrides)
        run_dir = Path(hydra_config.runtime.output_dir)
        if config.resume:
            config = resumed(config, overrides, run_dir)
        from training.fit import train  # torch and Lightning take seconds: after the keys

        train(config, run_dir)


if __name__ == "__main__":
    run(main, prepare=directory)
