"""``resume=RUN``: a run goes on with the settings that its config.yaml holds.

That file is data: it is checked as every other (``training.registry``), and what it says of other
files, or of what files may name, is not taken from it. Keys that the user gives come on top.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from training.registry import stored, trust

OWN = (
    "resume",
    "ckpt_path",
    "allow_config_changes",
    "trusted",
    "hydra",
)  # of this start, whatever the file says
FRESH = ("init_from",)  # of the first start alone


def directory(arguments: Sequence[str]) -> list[str]:
    """The arguments with the run's directory as that of the run; it must be there."""
    given = [a.partition("=")[2] for a in arguments if a.startswith("resume=")]
    if not given or given[-1] == "null":
        return list(arguments)
    if not given[-1]:
        raise ValueError("resume: nothing is given; give the directory of a run")
    run = given[-1][1:-1] if given[-1][0] in "'\"" else given[-1]
    if not (Path(run) / "config.yaml").is_file():
        raise FileNotFoundError(f"resume: {run} has no config.yaml; give the directory of a run")
    for argument in arguments:  # the processes that a run starts are told its directory
        key, _, value = argument.partition("=")
        if key == "hydra.run.dir" and Path(value.strip("'\"")).resolve() != Path(run).resolve():
            raise ValueError(f"hydra.run.dir is that of resume={run}; leave {value} out")
    return [*arguments, f'hydra.run.dir="{run}"']


def resumed(config: DictConfig, overrides: Sequence[str], run_dir: Path) -> DictConfig:
    """The configuration of a run that ``resume`` names, with what the user gave on top.

    Args:
        config: as composed for this start; of it are the keys in ``OWN``, and those that the file
            has not.
        overrides: what the user gave.
    """
    path = run_dir / "config.yaml"
    trust(config.trusted)
    config_of_run = stored(path)
    written = OmegaConf.select(config_of_run, "callbacks.checkpoint.directory")
    before = str(Path(written).parent) if written else str(run_dir)
    settings: Any = OmegaConf.to_container(_moved(config_of_run, before, str(run_dir)))
    plain: Any = OmegaConf.to_container(config, resolve=True)
    settings = {key: value for key, value in settings.items() if key not in (*OWN, *FRESH)}
    found = DictConfig({**plain, **settings})
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key in OWN or key.startswith("hydra."):
            continue
        if override.is_delete():
            raise ValueError(f"~{key}: nothing can be left out with resume=RUN; set it to null")
        value = override.value()
        if OmegaConf.is_dict(OmegaConf.select(found, key)) and not isinstance(value, dict | None):
            raise ValueError(
                f"{key}: groups are the run's with resume=RUN; give single keys, as"
                f" {key}.KEY=VALUE, or resume with ckpt_path=last and all switches"
            )
        if not override.is_add() and OmegaConf.select(found, key, default=found) is found:
            raise ValueError(f"{key}: the run has no such key; ++{key}=VALUE adds it")
        OmegaConf.update(found, key, value, force_add=True)
    found.ckpt_path, found.resume = config.ckpt_path or "last", None
    return found


def _moved(value: Any, before: str, after: str) -> Any:
    """What the run writes, where its directory is now."""
    if OmegaConf.is_dict(value):
        return DictConfig({key: _moved(value[key], before, after) for key in value})
    if isinstance(value, str) and (value == before or value.startswith(f"{before}/")):
        return after + value[len(before) :]
    return value
