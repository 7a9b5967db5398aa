"""How the processes of a run share its work, for Lightning: ``trainer=ddp`` and ``fsdp``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from training.checkpoints import load_checkpoint
from training.distributed import SummedGradients
from training.sharded_checkpoints import Key, Writer
from training.sharding import is_sharded, shard
from training.validation import positive_integer

HALVES = {"bf16-mixed": torch.bfloat16}


class Replicated(DDPStrategy):
    """Lightning's DDP. Where the step is a CUDA graph, gradients are exchanged inside of it."""

    def configure_ddp(self) -> None:
        step = getattr(self.lightning_module, "step", None)
        if getattr(step, "cuda_graphs", False):
            step.exchange = SummedGradients(step.net)  # type: ignore[union-attr]
        else:
            super().configure_ddp()

    def teardown(self) -> None:
        release_graphs(self)
        super().teardown()


class Sharded(ModelParallelStrategy):
    """Weights, gradients, optimizer and averages in shards (FSDP2).

    Args:
        replicas: hybrid sharding: so many copies of the network, each in shards of its own. With
            one a node (``trainer.num_nodes``) weights travel inside of nodes only, gradients
            between them too. 1: all processes share one network.
    """

    def __init__(self, replicas: int = 1) -> None:
        positive_integer("trainer.strategy.replicas", replicas)
        super().__init__()
        self.replicas = replicas
        self.writer: Writer | None = None

    def setup_environment(self) -> None:
        self._setup_distributed()
        processes = self.num_nodes * self.num_processes
        if processes % self.replicas:
            raise ValueError(
                "trainer.strategy.replicas must divide the number of processes"
                f" {processes}; got {self.replicas}"
            )
        shape = (self.replicas, processes // self.replicas)
        names = ("replicate", "shard")
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    @property
    def mesh(self) -> DeviceMesh:
        return self.device_mesh if self.replicas > 1 else self.device_mesh["shard"]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def shard(self, net: nn.Module) -> None:
        """Once; the weights are the first process's."""
        if not is_sharded(net):
            shard(net, self.mesh, HALVES.get(str(self.precision_plugin.precision)))

    # Checkpoints: shards of every process, in the structure of a checkpoint in one file.

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """All processes take part. Returns before it is written: ``last`` is the one before until
        this one is whole.
        """
        if self.writer is None:
            self.writer = Writer()
        path = Path(self.broadcast(str(filepath)))
        self.writer.save(checkpoint, path, self.checkpoint_io.save_checkpoint)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """From whatever number of processes, also from one that did not shard."""
        return load_checkpoint(Path(checkpoint_path), self._layout)

    def _layout(self, key: Key) -> torch.Tensor | None:
        """A tensor that is sharded as that at this place of a checkpoint."""
        if key[0] == "optimizer_states":  # ..., optimizer, "state", parameter, name
            groups = self.optimizers[int(key[1])].param_groups
            return [p for group in groups for p in group["params"]][int(key[3])]
        own = self.module.state_dict(keep_vars=True)
        name = str(key[-1])
        like = own.get(name if key[0] == "state_dict" else f"net.{name}")
        return like.detach() if isinstance(like, torch.Tensor) else None

    @property
    def module(self) -> nn.Module:
        if self.lightning_module is None:
            raise RuntimeError("this strategy has no module yet")
        return self.lightning_module

    def finish(self) -> None:
        """Wait until the checkpoint that was saved last can be read."""
        if self.writer is not None:
            self.writer.wait()

    def teardown(self) -> None:
        release_graphs(self)
        try:
            self.finish()
        finally:
            super().teardown()


def release_graphs(strategy: Strategy) -> None:
    """Before the processes part, also after an error."""
    step = getattr(strategy.lightning_module, "step", None)
    if step is not None:
        step.release()
