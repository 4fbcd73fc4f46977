"""What a run folder holds: the names that those who write it and those who read it share."""

from __future__ import annotations

SETTINGS = "config.yaml"  # written first: a folder that has it is a run folder
ENVIRONMENT = "environment.jsonl"  # software and hardware, a line for each start
METRICS = "metrics.csv"  # a row for each logged step
LAYERS = "layers.csv"  # norms of each layer
DATAPOINTS = "datapoints"  # folder: the record of what was seen
ORDER = "order.json"  # in DATAPOINTS: everything that determines the order of the data
EVALUATIONS = "evaluations.jsonl"  # results of tasks and texts written during training, a line each
EVALUATION = "evaluation"  # folder: results of scripts/evaluate.py
STOPPED = "stopped.json"  # a signal ended the run; removed when it is resumed
ABANDONED = "abandoned"  # folder: NNN-from-STEP holds what a rollback or the resume of an older checkpoint discarded
LOGS = "logs"  # folder: a log for each rank
PROFILE = "profile"  # folder, with --profile.steps
REPORT = "report.html"
HF = "hf"  # folder: the model for transformers, with --save.hf
