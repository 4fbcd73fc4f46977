"""What a run folder holds: the names that those who write it and those who read it share."""

from __future__ import annotations

SETTINGS = "config.yaml"  # from the start: a folder with it is a run's
ENVIRONMENT = "environment.jsonl"  # software and hardware, a line each start
METRICS = "metrics.csv"  # a row each logged step
LAYERS = "layers.csv"  # norms of each layer
DATAPOINTS = "datapoints"  # folder: the record of what was seen
ORDER = "order.json"  # in DATAPOINTS: from which the order of the data follows
EVALUATIONS = "evaluations.jsonl"  # results of tasks and texts written during training, a line each
EVALUATION = "evaluation"  # folder: results of scripts/evaluate.py
STOPPED = "stopped.json"  # while a signal has ended the run and it was not resumed
ABANDONED = "abandoned"  # folder: NNN-from-STEP has what a rollback or the resume of an older checkpoint discarded
LOGS = "logs"  # folder: a log for each rank
PROFILE = "profile"  # folder, with --profile.steps
REPORT = "report.html"
HF = "hf"  # folder: the model for transformers, with --save.hf
