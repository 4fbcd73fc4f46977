"""Make `.venv` and install the project into it. Standard library only; `make install` calls this.

    python3 scripts/install.py [--system-site-packages]

Environment:
    TORCH_INDEX_URL  install torch from this index, as given on PyTorch's "Start locally" page (--index-url)
    FORCE=1          install CUDA packages on a machine without a compatible NVIDIA driver
    SYSTEM_SITE_PACKAGES=1  the same as --system-site-packages: reuse the torch of the calling Python

Packages are resolved before anything large is downloaded. A second call with nothing changed returns at once,
whichever Python calls it (to change the Python, remove `.venv`); an incomplete `.venv` left by a killed call is
recreated. The syntax is limited to Python 3.6, so that an old Python prints a clear error instead of a SyntaxError.
"""

import argparse
import contextlib
import ctypes
import ctypes.util
import hashlib
import importlib.util
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

TYPE_CHECKING = False  # type checkers assume True; avoids importing typing just for this
if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 11)
# From this version on, `install --dry-run --report` reads the wheels' metadata without downloading the wheels.
MIN_PIP = (26, 0)
EXTRAS = "test,dev,hf,gguf,data,plots,quickstart,serve"
STAMP = "llammlein-installed.json"  # in .venv, written last: the installed state
MARKER = "llammlein-installing"  # in .venv during an install
# Used if a server reports no size: CUDA 13 wheels of torch 2.13 for Linux, measured.
ESTIMATE_GB = 2.7


# Lines of pip for downloads of 10 MB or more, and for the installation itself.
LARGE_STEP = re.compile(
    r"\s*Downloading \S+ \(\d{2,}\.\d MB\)|\s*Using cached \S+ \(\d{2,}\.\d MB\)|Installing collected"
)


@contextlib.contextmanager
def lock(path: Path) -> "Iterator[None]":
    """Allow one install at a time. pip inherits the lock, so a pip that outlives its killed caller is waited for."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("waiting for another install in this folder to end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        os.set_inheritable(file.fileno(), True)
        yield


class Refusal(Exception):
    """A problem on the user's machine; the message says how to fix it."""


def check_python() -> None:
    if sys.version_info < MIN_PYTHON:
        raise Refusal(
            "Python {}.{} is too old, {}.{} or newer is needed ({} ran this).\n"
            "Name another one:  make install PYTHON=python3.12   or   python3.12 scripts/install.py".format(
                sys.version_info[0], sys.version_info[1], MIN_PYTHON[0], MIN_PYTHON[1], sys.executable
            )
        )
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise Refusal(
            f"This Python ({sys.executable}) has no {' and no '.join(missing)}, so it can't make an environment.\n"
            f"On Debian and Ubuntu:  apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv\n"
            "Otherwise name another Python:  make install PYTHON=/path/to/python3"
        )


def state(system_site_packages: bool) -> "dict[str, str]":
    """Everything an environment depends on; if it is unchanged, there is nothing to do."""
    files = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        files.update((ROOT / name).read_bytes())
    return {
        "files": files.hexdigest(),
        "root": str(ROOT),
        "extras": EXTRAS,
        "system_site_packages": str(system_site_packages),
        "torch_index_url": os.environ.get("TORCH_INDEX_URL", ""),
    }


def torch_range() -> "list[tuple[str, tuple[int, ...]]]":
    """Version bounds of torch in constraints.txt: [(">=", (2, 11)), ("<", (2, 14))]. Empty if unbounded."""
    found = re.search(r"^torch\s*([<>=!~][^;#\s]*)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    bounds = re.findall(r"(>=|<=|==|<|>)\s*([\d.]+)", found.group(1)) if found else []
    return [(sign, version_numbers(version)) for sign, version in bounds]


def version_numbers(version: str) -> "tuple[int, ...]":
    """(2, 13, 0) of "2.13.0+cpu": the numbers before a local label or a pre-release."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in numbers.group().split(".")) if numbers else ()


def is_suitable_torch(version: str, bounds: "list[tuple[str, tuple[int, ...]]]") -> bool:
    """Whether a torch version is within bounds, compared at the bound's precision."""
    own = version_numbers(version)
    tests = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "<": lambda a, b: a < b,
        ">": lambda a, b: a > b,
    }
    return bool(own) and all(tests[sign](own[: len(bound)], bound) for sign, bound in bounds)


def system_torch() -> "str | None":
    """Version of the calling Python's torch; None without one, or if a virtual environment hides it."""
    if sys.prefix != sys.base_prefix:
        return None
    import importlib.metadata  # missing in Python 3.7, which never gets here

    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def read_stamp(venv: Path) -> "dict[str, str]":
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def is_current(stamp: "dict[str, str]", wanted: "dict[str, str]") -> bool:
    """Whether the install is up to date. Options not given again (index, system packages) count as unchanged."""
    unsaid = [k for k in ("torch_index_url", "system_site_packages") if wanted[k] in ("", "False")]
    return all(stamp.get(k) == v for k, v in wanted.items() if k not in unsaid)


def version_in(venv: Path) -> str:
    """Version of the environment's Python, such as "3.11"; empty if it does not start. Takes about 20 ms."""
    try:
        return subprocess.check_output(
            [str(venv_python(venv)), "-I", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            stderr=subprocess.DEVNULL,
            universal_newlines=True,
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def remove(venv: Path) -> None:
    """Delete an environment, the marker last, so that a killed removal is resumed instead of rejected as foreign."""
    (venv / MARKER).touch()
    for child in venv.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(str(child))
        elif child.name != MARKER:
            child.unlink()
    shutil.rmtree(str(venv))


def clean_environment() -> "dict[str, str]":
    """The caller's environment without variables that would redirect pip's files."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX")}
    env.update(PIP_USER="0", PYTHONNOUSERSITE="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    return env


def run(*command: str, quiet: bool = False) -> str:
    result = subprocess.run(
        command,
        cwd=str(ROOT),
        env=clean_environment(),
        close_fds=False,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        universal_newlines=True,
    )
    if result.returncode:
        raise Refusal(f"this command failed ({result.returncode}):\n  {' '.join(command)}\n{result.stdout or ''}")
    return result.stdout or ""


def run_with_status(*command: str) -> None:
    """Run pip, showing its latest line on a terminal, elsewhere its large steps; all of its output if it fails."""
    lines = []
    width = shutil.get_terminal_size().columns - 1
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        cwd=str(ROOT),
        env=clean_environment(),
        close_fds=False,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if sys.stdout.isatty():
                print("\r\x1b[K" + line.strip()[:width], end="", flush=True)
            elif LARGE_STEP.match(line):
                print(line.strip()[:120], flush=True)
    if sys.stdout.isatty():
        print("\r\x1b[K", end="", flush=True)
    if process.returncode:
        raise Refusal(f"this command failed ({process.returncode}):\n  {' '.join(command)}\n{''.join(lines)}")


def make_venv(venv: Path, system_site_packages: bool) -> None:
    """Make sure there is a working environment with the marker in it."""
    marker = venv / MARKER
    if venv.exists():
        whole = venv_python(venv).exists() and not marker.exists()
        stamp = read_stamp(venv)
        # Installed by us elsewhere, or without the system's packages: don't patch it.
        ours_but_other = bool(stamp) and any(
            stamp.get(k) != v
            for k, v in state(system_site_packages).items()
            if k == "root" or (k == "system_site_packages" and v == "True")
        )
        # The base Python was upgraded: the installed packages are in a folder that is no longer used.
        ours_but_other = ours_but_other or (bool(stamp) and stamp.get("python") != version_in(venv))
        if whole and not ours_but_other:
            try:
                version = run(
                    str(venv_python(venv)), "-c", "import sys; print(*sys.version_info[:2]); import pip", quiet=True
                )
            except (Refusal, OSError):
                version = ""
            if version and tuple(int(v) for v in version.split()) >= MIN_PYTHON:
                if stamp:
                    (venv / STAMP).unlink()
                    marker.touch()
                return
        if not marker.exists() and not stamp and any(venv.iterdir()):
            raise Refusal(f"{venv} does not work and was not made by this script. Remove it and call again.")
        print(f"{venv} is half made or from elsewhere: making it anew", flush=True)
        remove(venv)
    venv.mkdir()
    marker.touch()
    flags = ["--system-site-packages"] if system_site_packages else []
    run(sys.executable, "-m", "venv", *flags, str(venv))


def renew_pip(python: str) -> None:
    version = re.findall(r"\d+", run(python, "-m", "pip", "--version", quiet=True))[:2]
    if tuple(int(v) for v in version) < MIN_PIP:
        run(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip>={}.{}".format(*MIN_PIP))


def resolve(python: str, *requirements: str) -> "list[dict[str, str]]":
    """Packages pip would install for these: name, version, URL. Reads the wheels' metadata without downloading them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        run(
            python, "-m", "pip", "install", "--quiet", "--dry-run", "--use-feature=fast-deps",
            "--report", str(report), "-c", str(ROOT / "constraints.txt"), *requirements, quiet=True,
        )  # fmt: skip
        found = json.loads(report.read_text())["install"]
    return [
        {
            "name": str(item["metadata"]["name"]).lower().replace("_", "-"),
            "version": str(item["metadata"]["version"]),
            "url": str(item["download_info"]["url"]),
        }
        for item in found
    ]


def cuda_of(packages: "list[dict[str, str]]") -> "int | None":
    """The CUDA major version these packages need, None without CUDA."""
    for package in packages:
        name, version = package["name"], package["version"]
        if name == "torch" and "+cu" in version:
            return int(version.split("+cu")[1][:2])
        if name == "cuda-toolkit" or re.match(r"nvidia-cuda-runtime(-cu\d+)?$", name):
            return int(version.split(".")[0])
    return 0 if any(p["name"].startswith("nvidia-") for p in packages) else None


def driver_cuda() -> "int | None":
    """The newest CUDA major version this machine's NVIDIA driver supports, None without a driver."""
    for name in ("libcuda.so.1", ctypes.util.find_library("cuda"), "nvcuda.dll" if os.name == "nt" else None):
        if not name:
            continue
        try:
            version = ctypes.c_int(0)
            if ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
                return version.value // 1000
        except (OSError, AttributeError):
            continue
    smi = shutil.which("nvidia-smi")
    if smi:
        text = subprocess.run([smi], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True).stdout
        found = re.search(r"CUDA Version:\s*(\d+)", text)
        return int(found.group(1)) if found else None
    return None


def size_of(url: str) -> "int | None":
    """Size of a URL in bytes, None if the server does not report it."""
    if url.startswith("file:"):
        path = Path(urllib.request.url2pathname(urllib.parse.urlparse(url).path))
        return path.stat().st_size if path.is_file() else None
    certificates = os.environ.get("PIP_CERT") or os.environ.get("REQUESTS_CA_BUNDLE") or None
    try:
        context = ssl.create_default_context(cafile=certificates)
        request = urllib.request.Request(url.split("#")[0], method="HEAD")
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            length = answer.headers.get("Content-Length")
    except (OSError, ValueError):
        return None
    return int(length) if length else None


def download_bytes(packages: "list[dict[str, str]]") -> "int | None":
    """Total download size; None, without further requests, as soon as a server does not report a size."""
    total = 0
    for package in packages:
        size = size_of(package["url"])
        if size is None:
            return None
        total += size
    return total


def check_cuda(packages: "list[dict[str, str]]", driver: "int | None", force: bool) -> None:
    """Refuse to download gigabytes of CUDA packages that this machine can't use."""
    cuda = cuda_of(packages)
    if cuda is None or (driver is not None and driver >= cuda):
        return
    total = download_bytes(packages)
    size_text = f"an estimated {ESTIMATE_GB} GB to download" if total is None else f"{total / 1e9:.1f} GB to download"
    release = f" {cuda}" if cuda else ""
    machine = "has no NVIDIA driver" if driver is None else f"has an NVIDIA driver that runs CUDA up to {driver} only"
    message = (
        f"The torch that pip would take brings CUDA{release}: {len(packages)} packages, {size_text}. "
        f"This machine {machine}."
    )
    if force:
        print(f"note: {message} Going on (FORCE=1 or TORCH_INDEX_URL).", flush=True)
        return
    version = system_torch()
    reuse = version is not None and is_suitable_torch(version, torch_range())
    raise Refusal(
        f"{message}\nNothing of it was downloaded. Choose:\n"
        "  TORCH_INDEX_URL=... make install   another build: CPU, or an older CUDA. The address is the one\n"
        '                                     after --index-url on PyTorch\'s "Start locally" page.\n'
        "  FORCE=1 make install               these packages all the same.\n"
        + (
            f"  SYSTEM_SITE_PACKAGES=1 make install   reuse the torch {version} that {sys.executable} has.\n"
            if reuse
            else ""
        )
        + "(Without make: the same with `python3 scripts/install.py`.)"
    )


def check_system_torch() -> None:
    if sys.prefix != sys.base_prefix:
        raise Refusal(
            f"--system-site-packages sees the packages of {sys.base_prefix}, not of the environment {sys.prefix}.\n"
            "Call it with a Python that is no virtual environment, or leave it out."
        )
    version = system_torch()
    if version is None:
        raise Refusal(f"--system-site-packages: {sys.executable} has no torch that could be reused. Leave it out.")
    bounds = torch_range()
    if not is_suitable_torch(version, bounds):
        wanted = ",".join(sign + ".".join(map(str, bound)) for sign, bound in bounds)
        raise Refusal(
            f"--system-site-packages: the torch {version} of {sys.executable} is not in the tested range ({wanted}).\n"
            "Leave it out, or call this with a Python whose torch is."
        )


def install(venv: Path, system_site_packages: bool) -> None:
    index = os.environ.get("TORCH_INDEX_URL", "")
    force = os.environ.get("FORCE", "") not in ("", "0")
    make_venv(venv, system_site_packages)
    python = str(venv_python(venv))
    renew_pip(python)
    torch, more = "torch", []
    if index:
        # The index decides on the version, local label included; only then do the other indexes join in.
        chosen = [p for p in resolve(python, "--no-deps", "--ignore-installed", "--index-url", index, "torch")]
        torch, more = f"torch=={chosen[0]['version']}", ["--extra-index-url", index]
    packages = resolve(python, *more, torch)
    check_cuda(packages, driver_cuda(), force=force or bool(index))
    print(f"installing into {venv}: about 100 packages, several minutes", flush=True)
    run_with_status(
        python, "-m", "pip", "install", "--progress-bar", "off", "-c", str(ROOT / "constraints.txt"), *more,
        torch, "-e", f"{ROOT}[{EXTRAS}]",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system-site-packages", action="store_true", help="reuse the torch of the calling Python")
    arguments = parser.parse_args()
    venv = ROOT / ".venv"
    system = arguments.system_site_packages or os.environ.get("SYSTEM_SITE_PACKAGES", "") not in ("", "0")
    wanted = state(system)

    def current() -> bool:
        stamp = read_stamp(venv)
        return is_current(stamp, wanted) and bool(stamp.get("python")) and stamp["python"] == version_in(venv)

    if current():
        own, calling = read_stamp(venv)["python"], "{}.{}".format(*sys.version_info[:2])
        if own != calling:
            print(f"note: .venv has Python {own}; {calling} called. To change it, remove .venv and call again.")
        return 0
    try:
        check_python()
        if system:
            check_system_torch()
        with lock(ROOT / ".venv.lock"):
            if current():  # another call has installed it in the meantime
                return 0
            install(venv, system)
            temporary = venv / (STAMP + ".tmp")
            temporary.write_text(json.dumps(dict(wanted, python=version_in(venv)), indent=1))
            os.replace(str(temporary), str(venv / STAMP))
            if (venv / MARKER).exists():
                (venv / MARKER).unlink()
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    print(f"ready: {venv_python(venv)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
