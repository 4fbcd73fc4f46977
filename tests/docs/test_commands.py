"""Every command of README.md and docs/ is run by a test, or listed here with the reason why it is not.

`pytest -m slow tests/docs/test_commands.py -rP` runs them, each in a folder of its own at a tiny size, and prints the
counts. A new command that neither runs there nor is listed here fails the default suite.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from docs_commands import Scratch, Words, build_template, documented, others, shrink
from running import ROOT, warm_python

# A pattern of our scripts' commands (launcher, script and arguments) -> the test that runs it instead, or the reason.
ELSEWHERE = {
    r"(sbatch|srun|cluster/) .*": "tests/scripts/test_cluster.py, tests/real_use/test_slurm.py: stand-ins for SLURM",
    r"scripts/convert_to_gguf\.py .*": "tests/model/test_gguf.py: a tokenizer trained here needs --pre_tokenizer",
    r"scripts/convert_checkpoint\.py .*": "tests/scripts/test_convert_checkpoint.py",
    r".*configs/debug\.yaml --objective distillation .*": "tests/training/test_distillation.py",
    r"pretrain/fabric_train\.py .*--optim\.schedule wsd .*": "tests/training/test_optim.py",
    r"pretrain/fabric_train\.py --config configs/quickstart\.yaml": "tests/scripts/test_quickstart.py",
    r".*topology_invariant true .*--resume latest": "tests/training/test_topology_invariant.py",
    r".* --word_budgets": "tests/training/test_word_budgets.py",
    r"torchrun .*": "tests/real_use/test_rank_errors.py and tests/training/test_distributed.py, in as many processes",
    r"scripts/quickstart\.py .*": "tests/scripts/test_quickstart.py",
    r"scripts/babylm\.py .*": "tests/scripts/test_babylm.py",
    r"scripts/serve\.py .*": "tests/evaluation/test_serving.py: it serves until it is stopped",
    r"scripts/evaluate\.py .*babylm:.*": "tests/evaluation/test_babylm.py, with evaluation data",
    r"scripts/evaluate\.py .*babyllama.*": "tests/evaluation/test_babyllama.py: its lengths need a longer context",
    r"scripts/convert_legacy\.py .*": "tests/scripts/test_convert_legacy.py, with files of each trainer",
    r"pretrain/fabric_train\.py --init_from OUTPUT .*": "tests/training/test_legacy.py",
    r"scripts/convert_config\.py .*": "tests/training/test_convert_config.py, with configs of each trainer",
    r"scripts/import_tokens\.py .*": "tests/scripts/test_import_tokens.py, with files of each format",
    r"scripts/prepare_data\.py .*--language de .*": "tests/data/test_filters.py: synthetic text is not German",
    r"scripts/prepare_data\.py .*--executor .*": "tests/data/test_prepare.py",
    r"scripts/(export_onnx|quantize)\.py .*": "tests/training/test_export_formats.py: extras onnx, quantize",
    r"scripts/replay\.py .*|scripts/trace_data\.py influence .*": "tests/training/test_replay.py",
    r"scripts/publish\.py .*--head SHA256": "tests/training/test_release.py",
    r".*--resume iter-00008000-ckpt\.pth.*": "tests/training/test_resume.py",
    r"pretrain/fabric_train\.py .*--preflight.*": "tests/training/test_preflight.py",
    r"pretrain/fabric_train\.py .*--distillation\.cache .*": "tests/training/test_distillation.py",
    r"scripts/plan_run\.py .*--predict_loss .*": "tests/scripts/test_plan_run.py",
    r"scripts/make_synthetic\.py .*": "tests/data/test_synthetic.py",
    r"pretrain/fabric_train\.py --config configs/synthetic\.yaml": "tests/training/test_entropy.py",
}
NOT_RUN = {
    r"scripts/publish\.py .*(NAME/MODEL).*": "publishes to a hub; tests/training/test_release.py has a stand-in",
    r"scripts/evaluate\.py .*lm_eval:.*": "needs the package lm-eval and the hub",
    r"scripts/generate\.py (?!.*--prompt).*": "a session on a terminal; tests/evaluation/test_generation_text.py",
    r"pretrain/fabric_train\.py .*--compile.*": "compiles on a GPU; benchmarks/gpu_check.sh",
    r"scripts/quickstart\.py .*TinyStories.*": "needs the data set TinyStories",
}
OTHERS = {
    r"make .*|(python3 )?scripts/install\.py.*|cluster/build_image.*|cp .*": "tests/scripts/test_install.py, .ci/run",
    r".*\b(pip|uv) .*|python -m build.*": "installs packages; the extras are those of pyproject.toml",
    r".*pytest .*|.*scripts/run_tests\.py.*|python tests/.*": "runs tests",
    r"(python )?benchmarks/.*": "tests/real_use/test_benchmarks_run.py, at toy size; some need a GPU",
    r"python docs/.*|python -m pretrain\.fabric_train --help|python -c.*": "written files are checked by tests/docs",
    r"(curl|vllm|euroeval|chromium|python -m sglang).*": "another program",
}
# Words of a command that runs are changed as tests/harness/docs_commands.py says.
PLACEHOLDER = re.compile(r"(DIR|FILE|FILES|SOURCE|T)")


def why_not(launcher: str, script: str, words: Words) -> str | None:
    """The test that runs a command instead of `test_runs`, or the reason why none does; None if it runs there."""
    line = " ".join(filter(None, [launcher, script, *words]))
    reasons = {**ELSEWHERE, **NOT_RUN}
    found = next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, line)), None)
    if found is None and any(PLACEHOLDER.fullmatch(word) for word in shrink(script, words)):
        return "a line that shows the syntax; the pages have the same command with names"
    return found


RUN = [command for command in documented() if why_not(*command) is None]


def test_every_command_is_listed() -> None:
    """Other programs' commands have a reason; each entry of the tables has a command and names existing tests."""
    lines = [" ".join(filter(None, [launcher, script, *words])) for launcher, script, words in documented()]
    unlisted = [command for command in others() if not any(re.fullmatch(pattern, command) for pattern in OTHERS)]
    assert unlisted == [], "say in OTHERS what runs it, or why nothing does"
    for table, found in ((ELSEWHERE, lines), (NOT_RUN, lines), (OTHERS, list(others()))):
        for pattern, reason in table.items():
            assert any(re.fullmatch(pattern, line) for line in found), f"no command matches {pattern}"
            for name in re.findall(r"tests/[\w/]+\.py|benchmarks/\w+\.\w+", reason):
                assert (ROOT / name).is_file(), name
    assert len(RUN) > 80


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs") / "template"
    build_template(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=lambda command: " ".join(command[1:2] + command[2])[:100])
def test_runs(command: tuple[str, str, Words], template: Path, tmp_path: Path) -> None:
    _, script, words = command
    scratch = Scratch(tmp_path / "folder", template)
    line = [script, *scratch.prepare(script, shrink(script, words))]
    start = [warm_python()] if script.endswith(".py") else ["bash"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": warm_python()}
    done = subprocess.run(
        [*start, *line], cwd=scratch.folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{shlex.join(line)}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


@pytest.mark.slow
def test_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints how many commands run, and why the others do not."""
    counts = Counter(why_not(*command) or "run here" for command in documented())
    for command in others():
        counts[next(reason for pattern, reason in OTHERS.items() if re.fullmatch(pattern, command))] += 1
    for reason, count in counts.most_common():
        print(f"{count:4} {reason}")
    print(f"{sum(counts.values()):4} commands")
