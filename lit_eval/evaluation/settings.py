"""Settings of an evaluation: the flags of scripts/evaluate.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lit_data.corpus.options import check_split
from lit_eval.model.choices import Precision, Prefix

TASK_NAMES = (
    "babyllama", "babylm:FOLDER", "confidence", "generation", "german_pairs", "lm_eval:NAME", "memorization",
    "perplexity", "speed", "synthetic",
)  # fmt: skip
"""The names that --tasks knows, with placeholders; lit_eval/evaluation/named_tasks.py has the tasks."""


@dataclass(frozen=True)
class EvaluationSettings:
    """The data and tasks to evaluate on, and how."""

    data: tuple[str, ...] = ()
    """Packed datasets, text files or folders to take the perplexity of, each as PATH or NAME=PATH. Default, if there
    are no tasks either: the validation data of the run."""
    tasks: tuple[str, ...] = ()
    """Tasks by name, task files (.jsonl) or folders of them."""
    num_samples: int | None = None
    """Score at most this many documents or items of each, evenly spaced in packed data, tasks and prompts, and the
    first ones of texts; and generate as many texts. Default: all, and each task's own number of texts."""
    text_field: str = "text"
    """Field or column that holds the text in .jsonl and Parquet."""
    split_documents: str | None = None
    """Documents in plain text: file (default), blank_line, line, or the line that separates them."""
    source_field: str | None = None
    """Field or column to group documents by. Default: the name of the file."""
    custom_prompts: Path | None = None
    """Prompts for generation, memorization and babyllama: a line each, or .jsonl. Default: the first words of documents
    of the data; babyllama has its own."""
    train_data: tuple[str, ...] = ()
    """Packed training data, for memorization. Default: the data that the run's record names."""
    lm_eval_data: Path | None = None
    """Folder with the items of tasks lm_eval:NAME, read in place of the hub: NAME.jsonl (.parquet, .csv), or NAME with
    a file for each split."""
    lm_eval_tasks: Path | None = None
    """Folder with more task files (YAML) for lm_eval:NAME."""
    babylm_results: Path | None = None
    """Folder for the predictions of tasks babylm:FOLDER, laid out as the pipeline's `results`. Default: babylm/ beside
    the file of results."""
    num_fewshot: int | None = None
    """Examples before each item of lm_eval:NAME. Default: the task's."""
    prefix: Prefix = "auto"
    """The token before a text that nothing else precedes. auto: BOS if the model's export declares one, else EOS, as in
    lm-evaluation-harness; none: a text's first token is not scored."""
    batch_tokens: int = 16384
    """Tokens in a batch, padding included. Changes speed and memory, and no number beyond rounding."""
    device: str | None = None
    """A torch device. Default: cuda where there is one."""
    precision: Precision = "fp32"
    """fp32; bf16 or fp16 by autocast."""
    tokenizer: Path | None = None
    """Tokenizer folder or file. Default: the model's own."""
    output: Path | None = None
    """File of the results (JSON); a picture of the same name is put beside it. Default: RUN/evaluation/CHECKPOINT.json,
    or evaluation/NAME.json for a Hugging Face folder."""
    overwrite: bool = False
    """Run tasks again that the results file already has."""

    def __post_init__(self) -> None:
        if self.split_documents is not None:
            check_split(self.split_documents)
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"--num_samples {self.num_samples} must be at least 1")
        if self.batch_tokens < 1:
            raise ValueError(f"--batch_tokens {self.batch_tokens} must be at least 1")
        if self.output is not None and self.output.suffix != ".json":
            raise ValueError(f"--output {self.output} must end in .json")
