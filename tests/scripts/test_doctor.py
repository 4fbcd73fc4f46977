"""scripts/doctor.py: every item has a finding here, and each fault that can be made has a remedy."""

from __future__ import annotations

import os
import resource
import runpy
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT

from lit_files.platform import usable_cores
from pretrain.preflight import doctor
from pretrain.preflight.context import Finding


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["doctor.py"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "scripts" / "doctor.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert left.value.code == 0 and [line.split()[1] for line in lines] == [name.split()[0] for name, _ in doctor.ITEMS]
    assert f"torch {torch.__version__}" in lines[1] and str(tmp_path) in lines[-1]
    assert not list(tmp_path.iterdir())


def test_faults_have_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(10 * usable_cores()))
    assert "set OMP_NUM_THREADS to at most" in warned(doctor.threads())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "install g++" in warned(doctor.compiler())
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    assert "make install" in warned(doctor.python())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        assert warned(doctor.open_files()).startswith("ulimit -n ")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is found here")
def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "driver_version", lambda: "570.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "docs/install.md" in warned(doctor.devices(), "failed")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "update the driver" in warned(doctor.devices(), "failed")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object) -> bytes:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor, "sync_file", refuse)
    finding = doctor.disk()
    assert finding.verdict == "failed" and "Read-only file system" in finding.measured and not os.listdir(tmp_path)


def test_an_item_that_raises_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "ITEMS", (("broken", broken), ("threads", doctor.threads)))
    (_, first), (_, second) = doctor.examine()
    assert first.verdict == "failed" and "no such thing" in first.measured and second.measured


def warned(finding: Finding, verdict: str = "warning") -> str:
    assert finding.verdict == verdict and finding.measured
    return finding.advice
