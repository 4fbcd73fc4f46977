"""For tests of the documentation: the commands in README.md and docs/, and a folder in which they run at a tiny size.

`documented()` lists the commands of our scripts, `others()` those of other programs. `shrink` gives the words with
which a command is run: placeholders replaced, the trainer's sizes reduced by the flags in SMALL, step numbers by STEPS.
`Scratch` makes the inputs that a command names, so that each one runs alone.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from running import ROOT, script, train_in_process
from small_models import synthetic_texts

SCRIPT = r"(?:pretrain|scripts|cluster)/\w+\.(?:py|sh|sbatch)"
LAUNCHERS = r"(?:[\w./-]*python3? |torchrun .*?|srun .*?|sbatch .*?|bash )?"
# Job scripts that pass their arguments on.
PASSED_ON = {
    "cluster/train.sbatch": "pretrain/fabric_train.py",
    "cluster/debug.sbatch": "pretrain/fabric_train.py",
    "cluster/prepare.sh": "scripts/prepare_data.py",
    "cluster/prepare.sbatch": "scripts/prepare_data.py",
    "cluster/convert.sbatch": "scripts/convert_to_hf.sh",
}
# Placeholders for values and omitted flags in the guides.
VALUES = {"configs/X.yaml": "configs/debug.yaml", "N": "1"}
FLAGS = {
    "pretrain/fabric_train.py": "--config configs/debug.yaml",
    "scripts/prepare_data.py": "--input corpus/ --tokenizer tokenizer/ --output data/",
}
# Commands without arguments to parse, or run before the project is installed.
WITHOUT = {"cluster/build_image.sh", "scripts/install.py", "scripts/run_checks.py", "scripts/run_tests.py"}
Words = tuple[str, ...]


def text_of(path: Path) -> str:
    """A file with its continued lines joined."""
    return re.sub(r"\s*\\\n[ \t]*#?[ \t]*", " ", path.read_text(encoding="utf-8"))


def commands_of(path: Path) -> list[tuple[str, Words]]:
    """(script, arguments) of each command in a file that is complete enough to be parsed."""
    return [(script, words) for _, script, words in launched_commands_of(path)]


def launched_commands_of(path: Path) -> Iterator[tuple[str, str, Words]]:
    """(launcher and path as written, script, arguments) of each command."""
    for line in text_of(path).splitlines():
        inline = [code for code in re.findall(r"`([^`]+)`", line) if re.search(SCRIPT, code)]
        for code in inline or [line.lstrip("# ")]:
            match = re.match(rf"({LAUNCHERS}({SCRIPT}))( .*)", code)
            # In prose and in shell code anything may follow a script's name.
            if match and "$" not in match[3] and (inline or re.match(r" (-|[\w./]+( |$))", match[3])):
                script = PASSED_ON.get(match[2], match[2])
                if (words := words_of(match[2], script, match[3])) is not None and script not in WITHOUT:
                    yield match[1], script, words


def words_of(job: str, script: str, rest: str) -> Words | None:
    rest = re.sub(r" #.*|(?<=\S)   +\S.*", "", rest)  # a comment after it
    rest = re.sub(r"\[(--\w+[^\]]*)\]", r"\1", rest.replace("[--any.field value]", ""))  # optional flags, included
    rest = re.sub(r"(--config )?\.\.\.|FLAGS", FLAGS.get(script, ""), rest)
    words = [VALUES.get(word, word.split("|")[0]) for word in shlex.split(rest)]
    if job == "cluster/prepare.sh":  # PARTS [flags of sbatch] -- flags
        return tuple(words[words.index("--") + 1 :]) if "[flags" not in words else None
    if job == "cluster/prepare.sbatch":
        return ("--stage", *words)
    return tuple(words)


def pages() -> list[Path]:
    """The pages that people read; docs/reference/ repeats the examples of --help."""
    docs = (path for path in (ROOT / "docs").rglob("*.md") if "reference" not in path.parts)
    return [ROOT / "README.md", *sorted(docs)]


def documented() -> dict[tuple[str, str, Words], str]:
    """(launcher, script, arguments) -> page, of our scripts' commands; the launcher is "" or its name."""
    found: dict[tuple[str, str, Words], str] = {}
    for page in pages():
        for written, name, words in launched_commands_of(page):
            launcher = re.match(r"torchrun|srun|sbatch|cluster/", written)
            found.setdefault((launcher[0] if launcher else "", name, words), str(page.relative_to(ROOT)))
    return found


OTHER = re.compile(
    r"(\.venv/bin/)?(python3? (-m|-c|benchmarks/|tests/|docs/)|(pip|uv|make|pytest|chromium|curl|vllm|euroeval|cp) \S"
    r"|benchmarks/\S+\.(sh|py)|cluster/build_image|(python3? |\.venv/bin/python )?scripts/(install|run_\w+)\.py)"
)


def others() -> dict[str, str]:
    """Command -> page, of other programs and of scripts without arguments to parse."""
    found: dict[str, str] = {}
    for page in pages():
        text = text_of(page)
        blocks = re.findall(r"^[ ]*```\w*\n(.*?)^[ ]*```$", text, re.DOTALL | re.MULTILINE)
        lines = [line.strip() for block in blocks for line in block.splitlines()]
        lines += [code for line in text.splitlines() for code in re.findall(r"`([^`]+)`", line)]
        for line in lines:
            if OTHER.match(line):
                command = re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", line)).strip()
                found.setdefault(command, str(page.relative_to(ROOT)))
    return found


# The sizes at which the trainer runs, instead of those of the config and the flags.
SMALL = {
    "--accelerator": "cpu",
    "--precision": "fp32",
    "--compile": "false",
    "--train.max_steps": "12",
    "--train.global_batch_samples": "4",
    "--train.micro_batch_samples": "2",
    "--train.block_size": "128",
    "--optim.warmup_steps": "1",
    "--save.every_steps": "4",
    "--eval.every_steps": "6",
    "--eval.max_samples": "8",
}
SIZES = {
    "--model.n_layer": "2",
    "--model.n_head": "4",
    "--model.n_query_groups": "4",
    "--model.n_embd": "32",
    "--model.intermediate_size": "48",
}
LEFT_OUT = (  # contradict the sizes above
    *("--train.max_tokens", "--train.max_epochs", "--optim.warmup_fraction", "--optim.decay_steps"),
    *("--eval.tasks_every_tokens", "--data.cache_gb", "--data.cache_dir"),
)
VOCAB_SIZE = "400"
STEPS = {"1000": "4", "2000": "8", "100": "3", "999": "3", "40": "3", "500": "2"}
STEPS |= {"00001000": "00000004", "00002000": "00000008"}
PLACEHOLDERS = {
    "RUN": "runs/mine", "RUN_OR_CHECKPOINT": "runs/mine", "CHECKPOINT": "runs/mine", "PATH": "runs/mine",
    "MODEL": "runs/mine", "MODEL1": "runs/a", "MODEL2": "runs/b", "MODEL3": "runs/c",
    "OUTPUT": "out", "FOLDER": "out", "FILE.gguf": "out.gguf", "doc-1234": "ID",
}  # fmt: skip


def without(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The words without these flags and their values."""
    kept: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = word.partition("=")[0] in flags
        if not skipping:
            kept.append(word)
    return kept


def shrink(script: str, words: Words) -> list[str]:
    """The words with which a documented command is run."""
    changed = [PLACEHOLDERS.get(word, word) for word in words]
    if script == "pretrain/fabric_train.py":
        changed = without(changed, (*SMALL, *SIZES, *LEFT_OUT))
        if "--devices" in changed:
            changed[changed.index("--devices") + 1] = "2"
        if "--config runs/" in " ".join(words):  # a run continues as it began
            return changed
        sizes = {} if "--init_from" in words else SIZES
        return [*changed, *(word for flag in (SMALL | sizes).items() for word in flag)]
    if script.startswith("cluster/") or script.endswith("plan_run.py"):
        return changed
    changed = [STEPS.get(word, re.sub(r"(?<=iter-)\d{8}", lambda m: STEPS.get(m[0], m[0]), word)) for word in changed]
    changed = [re.sub(r"(?<=step)\d+$", lambda m: STEPS.get(m[0], m[0]), word) for word in changed]
    for flag, value in (("--vocab_size", VOCAB_SIZE), ("--val_fraction", "0.1"), ("--last", "3")):
        if flag in changed:
            changed[changed.index(flag) + 1] = value
    return changed


# Flags whose values are written, not read.
WRITTEN = ("--output", "--out_dir", "--html", "--png", "--picture", "--to", "--json", "--work", "--repo")
# The kind of input that a flag names, for a script or for all.
KINDS = {
    "--input": "text", "--val_input": "text", "--train": "text", "--dev": "text", "--text": "text",
    "--tokenizer": "tokenizer", "--data": "packed", "--prompts": "prompts", "--custom_prompts": "prompts",
    "--eval.prompts": "prompts", "--teachers": "run", "--distillation.cache": "cache", "--init_from": "run",
    "--verify": "release", "scripts/convert_from_hf.py --input": "hf", "scripts/verify_hf.py --hf": "hf",
    "scripts/import_tokens.py --input": "tokens",
    "scripts/evaluate.py --data": "text", "scripts/convert_legacy.py": "legacy", "scripts/convert_config.py": "yaml",
    "scripts/inspect_dataset.py": "packed", "scripts/count_words.py": "packed",
}  # fmt: skip
NAMES = (  # of inputs that no flag gives a kind
    (r"(runs|models)/.*", "run"),
    (r"hf(/.*)?", "hf"),
    (r"data/.*(train|val)|data/(web|books|law|drama)/.*", "packed"),
    (r"prompts\.txt", "prompts"),
    (r"blimp|.*pairs\.jsonl", "pairs"),
    (r"lambada\.jsonl", "endings"),
    (r"results/.*\.json", "results.json"),
    (r"release/.*", "release"),
    (r".*\.pth", "checkpoint"),
)


class Scratch:
    """A folder in which one command runs: the project's folders, and small inputs under the names that it uses.

    Args:
        template: a folder that `build_template` has filled.
    """

    def __init__(self, folder: Path, template: Path) -> None:
        self.folder, self.template = folder, template
        folder.mkdir(parents=True)
        for name in ("pretrain", "scripts", "configs", "docs", "lit_files", "lit_model", "lit_data", "lit_eval"):
            (folder / name).symlink_to(ROOT / name)

    def prepare(self, script: str, words: Sequence[str]) -> list[str]:
        """Make the inputs; returns the words with patterns expanded, and ID replaced by a document's."""
        flag, prepared = "", []
        for word in words:
            if word.startswith("--"):
                flag, equals, word_value = word.partition("=")
                if not equals:
                    prepared.append(word)
                    continue
                self.provide(script, flag, word_value)
                prepared.append(word)
                continue
            self.provide(script, flag, word)
            found = sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(word)) if "*" in word else []
            prepared += found or ["doc-0" if word == "ID" else word]
        return prepared

    def provide(self, script: str, flag: str, value: str) -> None:
        """Make the inputs that a value names: a path, NAME=PATH, or YAML with paths in it."""
        if flag in WRITTEN or (script.endswith("convert_to_hf.sh") and re.match("hf|out", value)):
            return
        kind = KINDS.get(f"{script} {flag}".strip(), KINDS.get(flag))
        if flag == "--config":
            if value.startswith("configs/"):  # its teachers
                for path in re.findall(r"path: (\S+)", (ROOT / value).read_text()):
                    self.make(path, "run")
            else:
                self.make(str(Path(value).parent), "interrupted")
            return
        for path in re.findall(r"[\w./*-]*[\w/*]", value) if re.search(r"[{\[]", value) else [value.rpartition("=")[2]]:
            if "*" in path:
                for name in ("a", "b"):
                    self.make(path.replace("*", name), "run")
                continue
            if found := re.match(r"(.+)/(iter-\d+-ckpt\.pth|step\d+)$", path):
                path = found[1]
            named = next((k for pattern, k in NAMES if re.fullmatch(pattern, path.rstrip("/"))), None)
            if named is None or (kind is not None and kind != "run"):
                named = kind
            if named is not None:
                self.make(path, named)

    def make(self, path: str, kind: str) -> None:
        target = self.folder / path.rstrip("/")
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if kind == "text" and not target.suffix:
            target.mkdir()
            side = (
                "dev" if re.search("dev|val", target.name) else "train" if re.search("train|10M", target.name) else ""
            )
            lines = (self.template / "corpus" / "text.jsonl").read_text().splitlines()
            if side:
                some = lines[:100] if side == "dev" else lines
                (target / f"gutenberg.{side}").write_text("\n\n".join(json.loads(line)["text"] for line in some))
            else:
                (target / "text.jsonl").write_text("\n".join(lines) + "\n")
        elif kind == "text":
            source = self.template / "corpus" / ("text.txt" if target.suffix == ".txt" else "text.jsonl")
            shutil.copy(source, target)
        else:
            side = "val" if target.name == "val" else "train"
            source = self.template / (f"data/{side}" if kind == "packed" else kind)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
            if kind == "packed":
                shutil.copytree(self.template / "tokenizer", target.parent / "tokenizer", dirs_exist_ok=True)


def build_template(folder: Path) -> None:
    """Fill a folder with an input of each kind."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    texts = synthetic_texts(300)
    records = [{"id": f"doc-{i}", "text": text} for i, text in enumerate(texts)]
    (corpus / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (corpus / "text.txt").write_text("\n\n".join(texts[:20]))
    (folder / "prompts").write_text("the child\nan old man\n")
    make = {"--input": corpus / "text.jsonl", "--output": folder / "tokenizer", "--vocab_size": VOCAB_SIZE}
    done = script("train_tokenizer.py", *(word for pair in make.items() for word in pair))
    assert done.returncode == 0, done.stderr
    make = {"--input": corpus / "text.jsonl", "--tokenizer": folder / "tokenizer", "--output": folder / "data"}
    done = script("prepare_data.py", *(word for pair in make.items() for word in pair), "--val_fraction", "0.1")
    assert done.returncode == 0, done.stderr
    small = {**SMALL, **SIZES, "--data.train": folder / "data" / "train", "--data.val": folder / "data" / "val"}
    train_in_process([f"{flag}={value}" for flag, value in {**small, "--out_dir": folder / "run"}.items()])
    shutil.copytree(folder / "run", folder / "interrupted")
    (folder / "interrupted" / "iter-00000012-ckpt.pth").unlink()
    for name, words in {
        "hf": ("convert_to_hf.py", "--checkpoint", folder / "run", "--output", folder / "hf"),
        "release": ("publish.py", folder / "run", "--to", folder / "release"),
        "checkpoint": ("convert_from_hf.py", "--input", folder / "hf", "--output", folder / "checkpoint"),
        "results": ("evaluate.py", folder / "run", "--output", folder / "results.json"),
    }.items():
        done = script(str(words[0]), *words[1:])
        assert done.returncode == 0, (name, done.stderr)
    good, bad = "the child sleeps", "the child sleep"
    (folder / "pairs").mkdir()
    line = json.dumps({"sentence_good": good, "sentence_bad": bad, "UID": "agreement"}) + "\n"
    (folder / "pairs" / "agreement.jsonl").write_text(line * 3)
    (folder / "endings").write_text(json.dumps({"text": "the old man opened the door"}) + "\n")
