"""The installer's decisions, with pip and the machine replaced. What pip really does is tried by `make install`."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "install.py"
Package = dict[str, str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A fresh copy of the module for a checkout in tmp_path, without the caller's choices."""
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
    """Stands in for every subprocess: makes the environment's Python, answers the dry run with `packages`."""

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
    return pip


def package(folder: Path, name: str, version: str, size: int = 1) -> Package:
    """A sparse file of `size` bytes stands for the wheel."""
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


def test_half_made_environment_is_made_anew(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_interrupted_update_is_made_anew_too(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    use(install, monkeypatch, Pip(CPU))
    assert install.main() == 0
    (install.ROOT / "constraints.txt").write_text("numpy==2\n")
    use(install, monkeypatch, Pip(CPU, fails=True))
    with pytest.raises(KeyboardInterrupt):
        install.main()
    pip = use(install, monkeypatch, Pip(CPU))
    assert install.main() == 0
    assert sum("-m venv" in c for c in pip.commands) == 1


def test_a_moved_checkout_gets_its_own(install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(install, monkeypatch, Pip(CPU))
    assert install.main() == 0
    stamp = install.ROOT / ".venv" / install.STAMP
    stamp.write_text(stamp.read_text().replace(str(tmp_path), "/elsewhere"))
    pip = use(install, monkeypatch, Pip(CPU))
    assert install.main() == 0
    assert sum("-m venv" in c for c in pip.commands) == 1


def test_foreign_broken_environment_is_left_alone(
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


def test_force_and_a_fitting_driver_go_on(
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


def test_index_url_decides_on_the_build(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ("nvidia-nccl-cu13", "2.29", 0),  # CUDA, but which is unknown
    ],
)
def test_cuda_of(install: ModuleType, name: str, version: str, cuda: int | None) -> None:
    assert install.cuda_of([{"name": name, "version": version, "url": ""}]) == cuda


def test_old_python_is_told_what_to_do(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "MIN_PYTHON", (99, 0))
    assert install.main() == 2
    assert "PYTHON=" in capsys.readouterr().err


def test_missing_venv_is_told_what_to_do(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    assert install.main() == 2
    assert "-venv" in capsys.readouterr().err


def test_old_pythons_can_parse_it() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


def test_no_registry_is_named() -> None:
    assert not [word for word in ("pypi", "pytorch.org", "http") if word in SCRIPT.read_text().lower()]
