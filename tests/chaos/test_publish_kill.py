"""SIGKILL while a run of 12 checkpoints is published, at 20 random moments: the next call completes the release.

LLAMMLEIN_HUB_PACKAGES names a folder with another version of huggingface-hub to publish with.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_runs import train_family
from hub_stand_in import TOKEN, HubStandIn
from running import ROOT

from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_model.load import load_tensors

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

KILLS, CHECKPOINTS = 20, 12
OPEN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for revision in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained("me/model", revision=revision)
    tokenizer = AutoTokenizer.from_pretrained("me/model", revision=revision)
    print(revision, len(tokenizer), sum(p.double().sum().item() for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ("--train.max_steps=24", "--save.every_steps=2", "--eval.every_steps=12", "--log.report=false")
    return train_family("llama", tmp_path_factory.mktemp("publish") / "run", *settings)


def start(arguments: tuple[object, ...], environment: dict[str, str]) -> subprocess.Popen[str]:
    line = [sys.executable, str(ROOT / "scripts" / "publish.py"), *map(str, arguments)]
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def killed(process: subprocess.Popen[str], happened: Callable[[], bool], wait_s: float) -> bool:
    """Kill a publication `wait_s` after something happened; False if it ended before, without an error."""
    while not happened() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(wait_s)
    early = process.poll() is not None
    if not early:
        os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert not early or process.returncode == 0, output
    return not early


def test_upload_killed_at_random_moments(run: Path, tmp_path: Path) -> None:
    hub, generator = HubStandIn(), random.Random(16)
    other = os.environ.get("LLAMMLEIN_HUB_PACKAGES")
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0", **({"PYTHONPATH": other} if other else {}),
    }  # fmt: skip
    hub.slow_s = 0.01
    arguments = (run, "--to", "hub", "--repo", "me/model", "--license", "apache-2.0")
    kills = 0
    while kills < KILLS:
        tags = len(hub.repositories["me/model"].tags) if hub.repositories else 0
        moment = len(hub.requests) + generator.randint(1, 2 * tags + 14)
        process = start(arguments, environment)
        kills += killed(process, lambda at=moment: len(hub.requests) >= at, generator.uniform(0, 0.1))  # type: ignore[misc]
        if tags == CHECKPOINTS:
            break
    assert kills == KILLS, f"published after {kills} kills"
    done = start(arguments, environment)
    output, _ = done.communicate()
    assert done.returncode == 0, output
    versions = {request for request in hub.agents if request.startswith("hf_hub/")}
    print(f"{kills} kills, {len(hub.requests)} requests, {len(hub.uploads)} large files; {versions}")

    assert set(hub.uploads.values()) == {1} and set(hub.committed.values()) == {1}
    checkpoints = list_checkpoints(run)
    revisions = [f"step{checkpoint_step(path)}" for path in checkpoints]
    assert set(hub.repositories["me/model"].tags) == set(revisions) and not (run / ".publishing").exists()
    for extra in ((), ("--download",)):
        verified = start(("--verify", "me/model", *extra), environment)
        output, _ = verified.communicate()
        assert verified.returncode == 0 and "12 revisions, no fault" in output, output
    opened = subprocess.run(
        [sys.executable, "-c", OPEN, *revisions, "main"],
        env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert opened.returncode == 0, opened.stderr
    lines = opened.stdout.splitlines()
    assert len(lines) == 13
    for line in lines:
        revision, n_tokens, total = line.split()
        path = checkpoints[-1] if revision == "main" else checkpoints[revisions.index(revision)]
        _, tensors = load_tensors(path)
        assert abs(float(total) - sum(t.to(torch.float64).sum().item() for t in tensors.values())) < 1e-6
        assert int(n_tokens) > 100
    hub.close()


def test_folder_killed_at_random_moments(run: Path, tmp_path: Path) -> None:
    generator, folder = random.Random(17), tmp_path / "release"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for kill in range(6):
        present = len(list(folder.glob("step*")))
        process = start((run, "--to", folder), environment)
        reached = lambda n=present: len(list(folder.glob("step*"))) > n  # noqa: E731
        assert killed(process, reached, generator.uniform(0, 0.5)), kill
    done = start((run, "--to", folder), environment)
    output, _ = done.communicate()
    assert done.returncode == 0, output
    verified = start(("--verify", folder), environment)
    output, _ = verified.communicate()
    assert verified.returncode == 0 and "12 revisions, no fault" in output, output
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
