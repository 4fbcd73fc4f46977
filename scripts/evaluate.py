"""Evaluate a run's newest checkpoint, a checkpoint or a Hugging Face folder: perplexity of texts, and tasks.

    python scripts/evaluate.py runs/mine                                       # its validation data
    python scripts/evaluate.py runs/mine --data law=corpus/law.jsonl --tasks german_pairs blimp/
    python scripts/evaluate.py --all_checkpoints runs/a runs/b --tasks blimp/   # learning curves

Writes the results as JSON, a picture beside them, and a table to the terminal. Tasks done before are not done again, so
that an interrupted call is repeated to finish it. Tasks: docs/evaluation.md; task files: docs/evaluation_tasks.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import RESUMES, ScriptParser, end_on_ctrl_c, given_fields, run_script

end_on_ctrl_c()

from lit_eval.evaluation.settings import TASK_NAMES, EvaluationSettings
from lit_files.run_files import EVALUATION

GROUPS = {
    "text_field": "reading: fields of the data, files of single tasks",
    "prefix": "execution: batches, device, precision, output",
}


def main() -> None:
    parser = ScriptParser(description=__doc__, epilog=f"tasks: {', '.join(TASK_NAMES)}", allow_abbrev=False)
    parser.add_argument("model", type=Path, nargs="+", metavar="MODEL", help="run, checkpoint or Hugging Face folder")
    parser.add_argument(
        "--all_checkpoints", action="store_true", help="evaluate every checkpoint of the runs, and draw their curves"
    )
    parser.add_fields(EvaluationSettings, GROUPS)
    args = parser.parse_args()
    if len(args.model) > 1 and not args.all_checkpoints:
        raise ValueError("give one MODEL, or --all_checkpoints for several runs; to compare models: scripts/compare.py")
    settings = EvaluationSettings(**given_fields(EvaluationSettings, args))
    from lit_eval.compare.entries import read_entries
    from lit_eval.compare.learning_curves import draw, learning_curves
    from lit_eval.evaluation.evaluate import evaluate, evaluate_all
    from lit_eval.evaluation.table import table_of

    if args.all_checkpoints:
        for run in evaluate_all(args.model, settings):
            print(f"{run.run}: {len(run.results)} checkpoints evaluated, {len(run.left_out)} left out")
            for reason in run.left_out.values():
                print(f"  left out: {reason}")
        curves = learning_curves(read_entries(args.model))
        if not curves:
            print("no learning curve: no task has results of two checkpoints")
            return
        picture = args.model[0] / EVALUATION / "learning_curves.png"
        draw(curves, picture)
        print(f"learning curves: {picture}")
        return
    results, output = evaluate(args.model[0], settings)
    print(table_of(results))
    print(f"results: {output}")


if __name__ == "__main__":
    run_script(main, RESUMES)
