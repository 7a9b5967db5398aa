"""Class accuracy of the final samples under an SVM trained on real images."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from training.callbacks.ema import averaged_net
from training.metrics.svm import SVM
from training.samplers.generate import balanced_labels, generate
from training.validation import positive_integer


class Accuracy(Callback):
    """At the end, logs ``sample_accuracy`` over n class-conditional samples of the averaged
    network, and ``real_accuracy`` of the same SVM over held-out real images, which is the ceiling
    to compare with.
    """

    def __init__(self, sampler: Any, n: int = 1000) -> None:
        positive_integer("callbacks.accuracy.n", n)
        self.sampler, self.n = sampler, n
        self.result: dict[str, float] = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        svm = SVM(*data.train)
        y = balanced_labels(self.n, data.num_classes)
        # Another seed than the picture's: these are other samples.
        seed: int = pl_module.seed + 1  # type: ignore[assignment,operator]
        images = generate(averaged_net(trainer, pl_module), self.sampler, y, data.shape, seed)
        self.result = {
            "sample_accuracy": svm.accuracy(images, y),
            "real_accuracy": svm.accuracy(*data.held_out),
        }
        for logger in trainer.loggers:
            logger.log_metrics(self.result, step=trainer.global_step)
