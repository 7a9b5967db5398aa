"""metrics.csv: one row a logged step, readable while the run goes on, continued on resuming."""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from training.whole_files import replaced


class CSVFile(Logger):
    """Writes ``directory/metrics.csv`` with a column ``step`` (optimizer steps made before) and one
    for each metric.

    Values logged for the same step share a row. A new metric adds a column.
    """

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.path = Path(directory) / "metrics.csv"
        self.columns = ["step"]
        self.rows: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        pass  # config.yaml has them

    def resume(self, step: int) -> None:
        """Keep an earlier run's rows before this step; later ones are about to be made again, and a
        row that a kill cut short is one of them.
        """
        if self.path.is_file():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or self.columns)
                whole = (row for row in reader if None not in row.values())
                self.rows = [row for row in whole if int(row["step"]) < step]
            self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {name: value for name, value in metrics.items() if name != "epoch"}
        new = [name for name in row if name not in self.columns]
        self.columns += new
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(row)
            self._rewrite()
        else:
            self.rows.append({"step": step, **row})
            if new or not self.path.is_file():
                self._rewrite()
            else:
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(self.rows[-1])

    def _rewrite(self) -> None:
        with replaced(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
