"""Export: ``python scripts/export.py ckpt=RUN/checkpoints/last.ckpt`` writes the weights to sample
from as safetensors, with the configuration in the metadata.
"""

import json
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save

from training.cli import one_line_errors, run
from training.trained import load_trained
from training.validation import one_of

DTYPES = ("float32", "bfloat16", "float16")


def export(config: DictConfig) -> None:
    one_of("dtype", config.dtype, DTYPES)
    path = Path(config.ckpt)
    trained = load_trained(path, str(config.weights))
    meta = {
        "config": OmegaConf.to_container(trained.config, resolve=True),
        "data": trained.data,
        "step": trained.step,
        "weights": str(config.weights),
    }
    dtype = getattr(torch, config.dtype)
    state = {name: value.to(dtype).contiguous() for name, value in trained.net.state_dict().items()}
    output = Path(config.output or path.resolve().parent.parent / "model.safetensors")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(save(state, {"format": "pt", "flash_jvp": json.dumps(meta)}))
    print(output)


@hydra.main(version_base="1.3", config_path="../configs", config_name="export")
def main(config: DictConfig) -> None:
    with one_line_errors():
        export(config)


if __name__ == "__main__":
    run(main)
