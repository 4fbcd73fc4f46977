"""Checks that a converted folder gives the same validation losses in transformers as its run's checkpoint does here."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import yaml

from lit_data.packed.manifest import MANIFEST
from lit_data.packed.reader import PackedDataset
from lit_data.record.trace import find_recorded
from lit_eval.agreement import largest_difference, our_span_losses, transformers_span_losses
from lit_eval.model.model_tokenizer import compare, describe_difference, of_data, of_model
from lit_eval.model.text_encoding import check_folder
from lit_files.nested_run import did_you_mean_run
from lit_files.run_files import METRICS, SETTINGS
from lit_model.load import Checkpoint, resolve

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """Mean losses (nats per target) over the validation spans, and the largest relative difference of a span's loss.

    Attributes:
        same_tokenizer: False if the folder or the data does not name its tokenizer.
        last_validation: the trainer's last one, None without any.
    """

    spans: int
    targets: int
    ours: float
    theirs: float
    largest_difference: float
    same_tokenizer: bool
    last_validation: float | None

    def __str__(self) -> str:
        """Two to four readable lines."""
        lines = [
            f"{self.spans} spans, {self.targets} targets: mean loss {self.ours:.6f} here, "
            f"{self.theirs:.6f} in transformers",
            f"largest relative difference of a span's loss: {self.largest_difference:.2e} (tolerance {TOLERANCE:.0e})",
        ]
        if self.last_validation is not None:
            relative = abs(self.last_validation / self.theirs - 1)
            last = f"the trainer's last validation: {self.last_validation:.6f}, relative difference {relative:.2e}"
            lines.insert(1, last)
        if not self.same_tokenizer:
            lines.insert(0, "warning: unknown whether the folder has the data's tokenizer: one of them names none")
        return "\n".join(lines)


def compare_with_transformers(run: Path, folder: Path) -> dict[str, Agreement]:
    """Compare a run's newest checkpoint with its converted folder on the rows that its validation used
    (eval.max_samples), of each set by its name ("": unnamed).

    Raises ValueError or FileNotFoundError if they don't belong together, naming the difference.
    """
    if not (run / SETTINGS).is_file():
        raise FileNotFoundError(f"{run} is not a run folder: it has no config.yaml{did_you_mean_run(run)}")
    settings = yaml.safe_load((run / SETTINGS).read_text(encoding="utf-8"))
    data, max_rows = settings["data"], settings["eval"]["max_samples"]
    if data["val"] is None:
        raise ValueError(f"{run} has no validation split (data.val)")
    checkpoint = Checkpoint(resolve(run))
    paths = data["val"] if isinstance(data["val"], dict) else {"": data["val"]}
    sets = {name: PackedDataset(find_recorded(run, path, MANIFEST)) for name, path in paths.items()}
    dataset = next(iter(sets.values()))  # the sets of a run have one tokenizer
    block_size = checkpoint.meta["config"]["train"]["block_size"] or checkpoint.model_config.block_size
    known, data_known = of_model(folder), of_data(dataset)
    verdict = compare(known, data_known)
    if verdict == "different":
        raise ValueError(
            f"--hf {folder} holds another tokenizer than the run's data: "
            f"{describe_difference(known, data_known, str(dataset.path))}"
        )
    if known.opened is not None:
        check_folder(run, folder, known.opened, dataset)
    same = verdict == "same"
    return {name: compare_set(run, folder, name, one, block_size, max_rows, same) for name, one in sets.items()}


def compare_set(
    run: Path,
    folder: Path,
    name: str,
    dataset: PackedDataset,
    block_size: int,
    max_rows: int | None,
    same_tokenizer: bool,
) -> Agreement:
    """Compare the losses on one validation set."""
    column = f"val_loss/{name}".rstrip("/")
    ours = our_span_losses(run, dataset, block_size, max_rows=max_rows)
    theirs = transformers_span_losses(folder, dataset, ours)
    with open(run / METRICS, newline="", encoding="utf-8") as file:
        validations = [float(row[column]) for row in csv.DictReader(file) if row.get(column)]
    return Agreement(
        len(ours.loss),
        int(ours.targets.sum()),
        ours.mean,
        theirs.mean,
        largest_difference(ours, theirs),
        same_tokenizer,
        validations[-1] if validations else None,
    )
