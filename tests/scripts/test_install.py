"""The installer's decisions, with pip and the machine replaced by stand-ins. `make install` runs the real pip."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from running import ROOT, script

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "install.py"
Package = dict[str, str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A fresh copy of the module for a checkout in tmp_path, without the caller's environment variables."""
    for name in ("TORCH_INDEX_URL", "FORCE", "SYSTEM_SITE_PACKAGES"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("install_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["install.py"])
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("numpy==1\n")
    return module


class Pip:
    """Replaces every subprocess: creates the environment's Python, answers the dry run with `packages`."""

    def __init__(self, packages: list[Package], fails: bool = False) -> None:
        self.packages = packages
        self.fails = fails
        self.commands: list[str] = []

    def __call__(self, *command: str, quiet: bool = False) -> str:
        self.commands.append(" ".join(command))
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        if "--report" in command:
            items = [
                {"metadata": {"name": p["name"], "version": p["version"]}, "download_info": {"url": p["url"]}}
                for p in self.packages
            ]
            Path(command[command.index("--report") + 1]).write_text(json.dumps({"install": items}))
        if "-e" in command and self.fails:
            raise KeyboardInterrupt
        if "-c" in command and "import pip" in command[-1]:
            return "3 11\n"
        return "pip 99.0 from somewhere" if "--version" in command else ""

    @property
    def installs(self) -> list[str]:
        return [c for c in self.commands if " -e " in c]


def use(install: ModuleType, monkeypatch: pytest.MonkeyPatch, pip: Pip, driver: int | None = None) -> Pip:
    monkeypatch.setattr(install, "run", pip)
    monkeypatch.setattr(install, "run_with_status", pip)
    monkeypatch.setattr(install, "driver_cuda", lambda: driver)
    monkeypatch.setattr(install, "system_torch", lambda: None)
    monkeypatch.setattr(install, "version_in", lambda venv: "3.11" if install.venv_python(venv).exists() else "")
    return pip


def package(folder: Path, name: str, version: str, size: int = 1) -> Package:
    """A package whose wheel is a sparse file of `size` bytes."""
    path = folder / f"{name}-{version}.whl"
    with path.open("wb") as file:
        file.truncate(size)
    return {"name": name, "version": version, "url": path.as_uri()}


@pytest.fixture
def cuda_packages(tmp_path: Path) -> list[Package]:
    return [
        package(tmp_path, "torch", "2.13.0", 500_000_000),
        package(tmp_path, "nvidia-cuda-runtime", "13.0.96", 1_000_000_000),
        package(tmp_path, "nvidia-cudnn-cu13", "9.20.0", 1_000_000_000),
    ]


CPU = [{"name": "torch", "version": "2.13.0+cpu", "url": "file:///nowhere.whl"}]


def test_second_call_does_nothing(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = use(install, monkeypatch, Pip(CPU))
    assert install.main() == 0
    assert len(pip.installs) == 1
    before = list(pip.commands)
    assert install.main() == 0
    assert pip.commands == before
    (install.ROOT / "constraints.txt").write_text("numpy==2\n")
    assert install.main() == 0
    assert len(pip.installs) == 2


def test_an_incomplete_environment_is_rebuilt(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    use(install, monkeypatch, Pip(CPU, fails=True))
    with pytest.raises(KeyboardInterrupt):
        install.main()
    leftover = install.ROOT / ".venv" / "leftover"
    leftover.touch()
    pip = use(install, monkeypatch, Pip(CPU))
    assert install.main() == 0
    assert not leftover.exists()
    assert len(pip.installs) == 1
    assert sum("-m venv" in c for c in pip.commands) == 1


def test_an_interrupted_update_is_rebuilt(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    use(install, monkeypatch, Pip(CPU))
    assert install.main() == 0
    (install.ROOT / "constraints.txt").write_text("numpy==2\n")
    use(install, monkeypatch, Pip(CPU, fails=True))
    with pytest.raises(KeyboardInterrupt):
        install.main()
    pip = use(install, monkeypatch, Pip(CPU))
    assert install.main() == 0
    assert sum("-m venv" in c for c in pip.commands) == 1


def test_a_moved_checkout_gets_a_new_environment(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(install, monkeypatch, Pip(CPU))
    assert install.main() == 0
    stamp = install.ROOT / ".venv" / install.STAMP
    stamp.write_text(stamp.read_text().replace(str(tmp_path), "/elsewhere"))
    pip = use(install, monkeypatch, Pip(CPU))
    assert install.main() == 0
    assert sum("-m venv" in c for c in pip.commands) == 1


def test_a_replaced_python_is_noticed(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's 3.11 became 3.12 under .venv: it starts, but finds none of its packages."""
    use(install, monkeypatch, Pip(CPU))
    assert install.main() == 0
    pip = use(install, monkeypatch, Pip(CPU))
    monkeypatch.setattr(install, "version_in", lambda venv: "3.12")
    assert install.main() == 0
    assert sum("-m venv" in c for c in pip.commands) == 1
    assert len(pip.installs) == 1
    assert install.main() == 0
    assert len(pip.installs) == 1


def test_version_in_a_real_and_a_broken_environment(install: ModuleType, tmp_path: Path) -> None:
    python = install.venv_python(tmp_path)
    assert install.version_in(tmp_path) == ""
    python.parent.mkdir(parents=True)
    python.symlink_to(tmp_path / "no such python")
    assert install.version_in(tmp_path) == ""
    python.unlink()
    python.symlink_to(sys.executable)
    assert install.version_in(tmp_path) == "{}.{}".format(*sys.version_info[:2])


def test_another_calling_python_gets_a_note(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = use(install, monkeypatch, Pip(CPU))
    monkeypatch.setattr(install, "version_in", lambda venv: "3.99")
    assert install.main() == 0
    capsys.readouterr()
    assert install.main() == 0
    assert "remove .venv" in capsys.readouterr().out
    assert len(pip.installs) == 1


def test_a_killed_removal_is_resumed(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    use(install, monkeypatch, Pip(CPU, fails=True))
    with pytest.raises(KeyboardInterrupt):
        install.main()
    (install.ROOT / ".venv" / "a_folder").mkdir()

    def killed(path: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(install.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            install.main()
    assert (install.ROOT / ".venv" / install.MARKER).exists()
    pip = use(install, monkeypatch, Pip(CPU))
    assert install.main() == 0
    assert len(pip.installs) == 1


def test_a_broken_environment_of_others_is_left_alone(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = install.ROOT / ".venv" / "mine.txt"
    mine.parent.mkdir()
    mine.touch()
    use(install, monkeypatch, Pip(CPU))
    assert install.main() == 2
    assert mine.exists()
    assert "Remove it" in capsys.readouterr().err


def test_cuda_without_driver_stops_before_the_download(
    install: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    cuda_packages: list[Package],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pip = use(install, monkeypatch, Pip(cuda_packages))
    assert install.main() == 2
    assert not pip.installs
    message = capsys.readouterr().err
    for part in ("2.5 GB", "3 packages", "CUDA 13", "no NVIDIA driver", "TORCH_INDEX_URL", "FORCE=1", "Start locally"):
        assert part in message


def test_reuse_is_offered_only_if_it_works(
    install: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    cuda_packages: list[Package],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (install.ROOT / "constraints.txt").write_text("torch>=2.11,<2.14\n")
    for version, offered in ((None, False), ("2.10.1+cu128", False), ("2.12.0+cpu", True)):
        use(install, monkeypatch, Pip(cuda_packages))
        monkeypatch.setattr(install, "system_torch", lambda version=version: version)
        assert install.main() == 2
        assert ("SYSTEM_SITE_PACKAGES" in capsys.readouterr().err) == offered


@pytest.mark.parametrize(
    ("version", "suitable"),
    [
        ("2.10.2", False),
        ("2.11.0", True),
        ("2.11.0+cu128", True),
        ("2.13.0+cpu", True),
        ("2.13.0a0+git1234567", True),
        ("2.14.0", False),
        ("2.14.0.dev20261101+cu130", False),
        ("3.0", False),
        ("unknown", False),
    ],
)
def test_range_of_a_reused_torch(install: ModuleType, version: str, suitable: bool) -> None:
    (install.ROOT / "constraints.txt").write_text("# torch>=9\ntorchmetrics==1.9.0\ntorch>=2.11,<2.14  # tested\n")
    assert install.torch_range() == [(">=", (2, 11)), ("<", (2, 14))]
    assert install.is_suitable_torch(version, install.torch_range()) == suitable


def test_reuse_of_an_unsuitable_torch_is_refused(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (install.ROOT / "constraints.txt").write_text("torch>=2.11,<2.14\n")
    monkeypatch.setattr(install.sys, "prefix", install.sys.base_prefix)
    monkeypatch.setenv("SYSTEM_SITE_PACKAGES", "1")
    for version, said in (("2.9.1", ">=2.11,<2.14"), (None, "has no torch")):
        pip = use(install, monkeypatch, Pip(CPU))
        monkeypatch.setattr(install, "system_torch", lambda version=version: version)
        assert install.main() == 2
        assert said in capsys.readouterr().err
        assert not pip.commands
    pip = use(install, monkeypatch, Pip([]))
    monkeypatch.setattr(install, "system_torch", lambda: "2.12.1+cu128")
    assert install.main() == 0
    assert any("-m venv --system-site-packages" in c for c in pip.commands)


def test_sizes_are_queried_until_one_is_unknown(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def size_of(url: str) -> int | None:
        asked.append(url)
        return None if url == "b" else 7

    monkeypatch.setattr(install, "size_of", size_of)
    packages = [{"name": u, "version": "1", "url": u} for u in "abc"]
    assert install.download_bytes(packages) is None
    assert asked == ["a", "b"]
    assert install.download_bytes([packages[0], packages[2]]) == 14


def test_old_driver_stops(
    install: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    cuda_packages: list[Package],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pip = use(install, monkeypatch, Pip(cuda_packages), driver=12)
    assert install.main() == 2
    assert not pip.installs
    assert "CUDA up to 12 only" in capsys.readouterr().err


def test_unknown_size_is_called_an_estimate(
    install: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    cuda_packages: list[Package],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cuda_packages[0]["url"] = "file:///no/such/file.whl"
    use(install, monkeypatch, Pip(cuda_packages))
    assert install.main() == 2
    assert "estimated" in capsys.readouterr().err


def test_force_or_a_matching_driver_continues(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, cuda_packages: list[Package]
) -> None:
    pip = use(install, monkeypatch, Pip(cuda_packages), driver=13)
    assert install.main() == 0
    assert len(pip.installs) == 1
    (install.ROOT / "constraints.txt").write_text("numpy==2\n")
    monkeypatch.setenv("FORCE", "1")
    pip = use(install, monkeypatch, Pip(cuda_packages), driver=None)
    assert install.main() == 0
    assert len(pip.installs) == 1


def test_index_url_selects_the_build(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_INDEX_URL", "https://example.invalid/whl/cpu")
    pip = use(install, monkeypatch, Pip(CPU))
    assert install.main() == 0
    assert "torch==2.13.0+cpu" in pip.installs[0]
    assert "--extra-index-url https://example.invalid/whl/cpu" in pip.installs[0]
    # The next call need not repeat the choice.
    monkeypatch.delenv("TORCH_INDEX_URL")
    before = list(pip.commands)
    assert install.main() == 0
    assert pip.commands == before


@pytest.mark.parametrize(
    ("name", "version", "cuda"),
    [
        ("torch", "2.13.0+cpu", None),
        ("torch", "2.11.0+cu126", 12),
        ("torch", "2.11.0+cu130", 13),
        ("torch", "2.11.0", None),
        ("nvidia-cuda-runtime-cu12", "12.8.90", 12),
        ("cuda-toolkit", "13.0.3.0", 13),
        ("nvidia-nccl-cu13", "2.29", 0),  # CUDA of unknown version
    ],
)
def test_cuda_of(install: ModuleType, name: str, version: str, cuda: int | None) -> None:
    assert install.cuda_of([{"name": name, "version": version, "url": ""}]) == cuda


def test_old_python_gets_instructions(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "MIN_PYTHON", (99, 0))
    assert install.main() == 2
    assert "PYTHON=" in capsys.readouterr().err


def test_missing_venv_gets_instructions(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    assert install.main() == 2
    assert "-venv" in capsys.readouterr().err


def test_old_pythons_can_parse_it() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


def test_no_registry_is_named() -> None:
    assert not [word for word in ("pypi", "pytorch.org", "http") if word in SCRIPT.read_text().lower()]


def test_requirements_are_current() -> None:
    """requirements.txt lists the dependencies of pyproject.toml, and each entry has a tested version."""
    assert script("write_requirements.py", "--check").returncode == 0
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [Requirement(line) for line in lines if not line.startswith(("#", "-c"))]
    assert "-c constraints.txt" in lines and len(listed) >= 10
    tested = [
        Requirement(line).name for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1].isalpha()
    ]
    assert {one.name.lower().replace("_", "-") for one in listed} <= {name.lower().replace("_", "-") for name in tested}


def test_every_dependency_has_its_cost() -> None:
    command = [sys.executable, str(ROOT / "docs" / "measure_dependencies.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
