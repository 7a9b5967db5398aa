"""W&B's workspace and report of compared runs, as code:

    python scripts/dashboard.py comparison=OUTPUT              saves both, for a logged-in user
    python scripts/dashboard.py comparison=OUTPUT save=false   prints what they would hold

OUTPUT is what scripts/compare.py wrote. Offline runs are uploaded first, with ``wandb sync``.
"""

import json
from pathlib import Path

import hydra
from omegaconf import DictConfig

from training.cli import one_line_errors, run
from training.comparison import dashboard
from training.validation import switch


def build(config: DictConfig) -> None:
    switch("save", config.save)
    path = Path(config.comparison) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"comparison: there is no {path}; give the directory that scripts/compare.py wrote"
        )
    results = json.loads(path.read_text())
    entity = dashboard.entity_or_raise(config.entity) if config.save else config.entity or "ENTITY"
    where = (entity, config.project)
    things = {
        "workspace": dashboard.workspace(*where, results["pair"]),
        "report": dashboard.report(*where, results["pair"], dashboard.verdicts(results)),
    }
    if config.save:
        for name, thing in things.items():
            print(f"{name}: {dashboard.save(thing)}")
        return
    print(f"{things['report'].title}, project {config.project}")
    for section in things["workspace"].sections:
        print(f"  {section.name}")
        for panel in section.panels:
            print(f"    {type(panel).__name__}: {dashboard.title_of(panel)}")


@hydra.main(version_base="1.3", config_path="../configs", config_name="dashboard")
def main(config: DictConfig) -> None:
    with one_line_errors():
        build(config)


if __name__ == "__main__":
    run(main)
