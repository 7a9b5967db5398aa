"""Export: ``python scripts/export.py ckpt=RUN/checkpoints/last.ckpt`` writes the weights to sample
from as safetensors, with the configuration in the metadata.
"""

import json
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save

from training.checksums import sealed_safetensors
from training.cli import one_line_errors, run
from training.loading import load_trained
from training.registry import trust
from training.validation import one_of
from training.whole_files import replaced

DTYPES = ("float32", "bfloat16", "float16")


def export(config: DictConfig) -> None:
    one_of("dtype", config.dtype, DTYPES)
    trust(config.trusted)
    path = Path(config.ckpt)
    trained = load_trained(path, str(config.weights))
    meta = {
        "config": OmegaConf.to_container(trained.config, resolve=True),
        "data": trained.data,
        "step": trained.step,
        "weights": str(config.weights),
        "checksum": True,
    }
    dtype = getattr(torch, config.dtype)
    state = {name: value.to(dtype).contiguous() for name, value in trained.net.state_dict().items()}
    output = Path(config.output or path.resolve().parent.parent / "model.safetensors")
    metadata = {"format": "pt", "flash_jvp": json.dumps(meta)}
    before = " (in place of the one before)" if output.exists() else ""
    with replaced(output) as temporary:
        temporary.write_bytes(sealed_safetensors(lambda metadata: save(state, metadata), metadata))
    print(f"{output}{before}")


@hydra.main(version_base="1.3", config_path="../configs", config_name="export")
def main(config: DictConfig) -> None:
    with one_line_errors():
        export(config)


if __name__ == "__main__":
    run(main)
