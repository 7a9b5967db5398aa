"""last.ckpt: every so many steps, at the end, and when the run is interrupted or fails; and those
that are kept on the way.
"""

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from training.background_checkpoints import BackgroundCheckpointIO
from training.callbacks.ema import EMA
from training.callbacks.non_finite_guard import Diverged
from training.distributed import Later, over_ranks
from training.strategies import Sharded
from training.validation import positive_integer

# Seconds in which further signals are the same wish: the terminal and a wrapper send one each, and
# so do impatient fingers.
SAME = 2.0


class Interrupted(Exception):
    """A signal ended the run; its checkpoint is written. ``signal`` is its number."""

    def __init__(self, number: int, path: Path, step: int) -> None:
        super().__init__(f"interrupted after step {step}; {remedy(path)}")
        self.signal = number


@contextmanager
def interrupted_once(callbacks: Sequence[Any]) -> Iterator[None]:
    """A signal that ended a helper of the step too, as a compiler, is told as an interrupt and not
    as the helper's failure. A checkpoint that could not be written is told as that.
    """
    try:
        yield
    except (Interrupted, Diverged):
        raise
    except Exception as error:
        for callback in callbacks:
            ours = isinstance(callback, LastCheckpoint) and callback.failed is not error
            if ours and callback.signal:
                step = max(callback.saved_step, callback.first)
                raise Interrupted(callback.signal, callback.path, step) from error
        raise


def remedy(path: Path) -> str:
    """How to go on: with what the run was given, without which it would be another one."""
    folder, script, given = str(path.parent.parent), [], []
    if set(folder) & set("=,()[]{}'"):  # as those of a sweep: Hydra reads them in quotes only
        folder = f'"{folder}"'
    if HydraConfig.initialized() and HydraConfig.get().job.name == "train":
        own = ("ckpt_path=", "hydra.run.dir=")
        script = ["python", sys.argv[0]]
        given = [o for o in HydraConfig.get().overrides.task if not o.lstrip("+").startswith(own)]
    if any(o.startswith("resume=") for o in given):
        return "resume with " + shlex.join([*script, *given])
    how, which = "resume", "last"
    if not path.exists():  # before the first checkpoint
        how, which = "start again", "auto"
    run = [f"ckpt_path={which}", f"hydra.run.dir={folder}"]
    return f"{how} with {shlex.join([*script, *run, *given])}"


def finish(trainer: Trainer) -> None:
    """Until the checkpoint that was saved last can be read."""
    if isinstance(trainer.strategy, Sharded):
        trainer.strategy.finish()
    elif io := beside(trainer):
        io.finish()


def beside(trainer: Trainer) -> BackgroundCheckpointIO | None:
    """What writes beside the training, where something does."""
    io = trainer.strategy.checkpoint_io
    return io if isinstance(io, BackgroundCheckpointIO) else None


def dumped(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint would hold now."""
    return trainer._checkpoint_connector.dump_checkpoint()


@contextmanager
def told() -> Iterator[None]:
    """A write's failure is told; the run's own error, which is told after it, goes on."""
    try:
        yield
    except Exception as error:
        print(f"error: {error}", file=sys.stderr)


class LastCheckpoint(Checkpoint):
    """Writes ``directory/last.ckpt``. SIGINT, SIGTERM and, without ``nohup``, SIGHUP let the step
    in progress finish, write it and raise ``Interrupted``; another signal later than ``SAME``
    seconds acts as usual. An error that ends the run leaves the last step that was finished;
    ``Diverged`` leaves the file as it is.

    ``keep_every_n_steps`` keeps the file of every so many steps as ``step_NNNNNNN.ckpt``, to be
    evaluated, sampled or exported like the last one, whose every average it has.
    """

    def __init__(
        self, directory: str, every_n_steps: int = 500, keep_every_n_steps: int | None = None
    ) -> None:
        positive_integer("callbacks.checkpoint.every_n_steps", every_n_steps)
        if keep_every_n_steps is not None:
            positive_integer("callbacks.checkpoint.keep_every_n_steps", keep_every_n_steps)
        self.path, self.every_n_steps = Path(directory) / "last.ckpt", every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.signal = self.stop = 0
        self.noted, self.saved_step = 0.0, -1
        self.failed: Exception | None = None  # a write
        self.ended = False  # the last step is made and written
        self.first = self.begun = 0  # steps made before this run, and with the one in progress
        self.handlers: dict[int, Any] = {}
        self.later = Later()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.path.parent.exists() and not self.path.parent.is_dir():
            raise NotADirectoryError(
                "callbacks.checkpoint.directory must be a folder, got the file"
                f" {self.path.parent}; move it out of the way"
            )
        self.first = self.begun = trainer.global_step
        heard = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
        for number in (signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * heard):
            self.handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.ended:  # pictures and summary are missing, which a resumed run makes
            self._restore()
            raise Interrupted(number, self.path, self.saved_step)
        if not self.signal:
            self.signal, self.noted = number, time.monotonic()
        elif time.monotonic() - self.noted > SAME:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.stop:  # not earlier: the step before is logged by now
            self._finish(trainer)
            raise Interrupted(self.stop, self.path, trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.begun = trainer.global_step + 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # gradients half accumulated are not in a checkpoint
        self._check(trainer)
        if trainer.world_size == 1:
            self.stop = self.signal
        else:  # one rank's signal stops all
            number = torch.full((1,), self.signal, device=pl_module.device, dtype=torch.float)
            for (found,) in self.later(over_ranks(number, "max")):
                self.stop = int(found)
        step = trainer.global_step
        # At the end at once, not after the other callbacks have drawn and judged their samples.
        end = step == trainer.max_steps or trainer.should_stop  # trainer.max_time is over
        keep = self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0
        if self.stop or step % self.every_n_steps == 0 or keep or end:
            self._save(trainer)
        elif step == self.first + 1 and (io := beside(trainer)):
            # by every process, as for one that is saved
            checkpoint = dumped(trainer)
            if trainer.is_global_zero:
                io.reserve(checkpoint)
        if end or (keep and trainer.is_global_zero):
            self._finish(trainer)
        if keep and trainer.is_global_zero:
            self._keep(step)
        self.ended = end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step not in (self.first, self.saved_step):
            self._save(trainer)
        self._finish(trainer)
        trainer.strategy.barrier()  # the file is there for every process
        self._restore()

    def _check(self, trainer: Trainer) -> None:
        """A write that failed beside the training ends it."""
        with self._writing(trainer):
            if io := beside(trainer):
                io.check()

    def _finish(self, trainer: Trainer) -> None:
        with self._writing(trainer):
            finish(trainer)

    def _save(self, trainer: Trainer) -> None:
        with self._writing(trainer):
            trainer.save_checkpoint(self.path)
        self.saved_step = trainer.global_step

    @contextmanager
    def _writing(self, trainer: Trainer) -> Iterator[None]:
        """What fails is not tried again."""
        try:
            yield
        except OSError as cause:
            error = OSError(f"{cause}; when it can be, {remedy(self.path)}")
            self.failed, self.saved_step = error, trainer.global_step
            raise error from cause
        except Exception as error:
            self.failed, self.saved_step = error, trainer.global_step
            raise

    def _keep(self, step: int) -> None:
        """The file just written, under a name of its own; the next last.ckpt is another file."""
        kept = self.path.with_name(f"step_{step:07d}.ckpt")
        kept.unlink(missing_ok=True)  # of a run that went on from an earlier step
        if self.path.is_symlink():  # to a folder of shards, which stays while a link points to it
            kept.symlink_to(self.path.readlink())
            return
        try:
            os.link(self.path, kept)
        except OSError:  # a file system without hard links
            shutil.copyfile(self.path, kept)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        step = trainer.global_step
        averages = [c.updates for c in trainer.callbacks if isinstance(c, EMA)]  # type: ignore[attr-defined]
        whole = self.begun <= step and all(updates == step for updates in averages)
        failed = isinstance(exception, Exception) and not isinstance(exception, Diverged)
        if io := beside(trainer):
            with told():
                io.finish()
        if not failed or not whole or step in (self.first, self.saved_step) or trainer.global_rank:
            return
        if isinstance(trainer.strategy, Sharded) and trainer.world_size > 1:
            return  # the shards of the others are out of reach
        self.saved_step = step
        # The loop's counters as they are after this step, whatever has begun since.
        loop, batches = trainer.fit_loop.epoch_loop, step * trainer.accumulate_grad_batches
        loop._batches_that_stepped = step
        for counter in (loop.batch_progress.total, loop.batch_progress.current):
            counter.load_state_dict(dict.fromkeys(vars(counter), batches))
        with told():  # not trainer.save_checkpoint: it would wait for the other processes
            trainer.strategy.save_checkpoint(dumped(trainer), self.path)
            finish(trainer)
            from training.cli import message  # which reads this file

            print(f"stopped: {message(exception)}")
            print(f"wrote last.ckpt after step {step}; {remedy(self.path)}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()
