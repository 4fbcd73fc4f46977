"""The dataclasses that are the command line: every field is a flag, its docstring the help.

Nothing here touches torch: a wrong value is refused before anything heavy is imported. Annotations are not postponed
(`from __future__ import annotations`), since jsonargparse would parse this file again for each class: 0.3 s a start.

One file, although a long one: it is the reference of all flags, in the order of --help, and nearly every check compares
settings with each other.
"""

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from lit_files.near_names import did_you_mean
from lit_model.config import ModelConfig

# Far beyond any run, and small enough that the numbers derived from them fit in memory and in 64 bits.
MAX_BATCH = 1 << 20  # rows; a step's rows are planned together
MAX_PREFETCH = 1 << 12
MAX_DEVICES = 1 << 10
MAX_MICRO_BATCH_TOKENS = 1 << 24  # of one device, far beyond what fits in its memory
AUTO: Literal["auto"] = "auto"
MAX_PROFILE = 100  # steps; a trace of one may take 10 MB
MAX_SYNTHETIC = 10**10
MAX_SECONDS = 10**9
MAX_NUMBER = 1 << 52

# Of train: only where state is sharded. Of distillation: only for live teachers, not for a cache.
SHARDED_ONLY = ("cpu_offload", "prefetch_blocks", "defer_gradient_sync")
LIVE_TEACHERS_ONLY = ("teacher_precision", "teacher_device", "shard_teachers", "compile_teachers")


def check_least(args: Any, section: str, **least: int) -> None:
    """Raise ValueError naming the flag of a value below its least; None is not checked."""
    for name, n in least.items():
        value = getattr(args, name)
        if value is not None and not value >= n:
            raise ValueError(f"--{section}{name} {value} must be at least {n}")


def optional_fields(config: type, leave_out: Collection[str]) -> list[tuple[str, Any, Any]]:
    """The fields of a config for `make_dataclass`, all optional; tuples become lists, as in YAML."""
    hints = get_type_hints(config)
    made = []
    for f in dataclasses.fields(config):
        if f.name not in leave_out:
            kind = hints[f.name]
            kind = list[get_args(kind)[0]] if get_origin(kind) is tuple else kind  # type: ignore[misc]
            made.append((f.name, kind | None, field(default=None, metadata={"documented_by": config})))
    return made


if TYPE_CHECKING:

    class ModelFields:
        """Every field of ModelConfig that a command line sets; None where it was not given."""

        def __init__(self, **fields: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

else:
    # block_size is train.block_size; the other two follow from what is given.
    ModelFields = dataclasses.make_dataclass(
        "ModelFields",
        optional_fields(ModelConfig, leave_out=("block_size", "padded_vocab_size", "family")),
        frozen=True,
    )


@dataclass(frozen=True)
class ModelArgs(ModelFields):
    """Model: the fields of ModelConfig. Default of each: that of the model --model.name."""

    name: str | None = None
    """Name in lit_model/registry.py, for example LLaMmlein_120M. Without it give the sizes."""
    vocab_size: int | None = None
    """Number of token ids. Default: the dataset's."""


@dataclass(frozen=True)
class SyntheticArgs:
    """Synthetic text from a grammar, for trials without data; tokenized and packed in OUT_DIR/data."""

    tokens: int = 0
    """Words to generate, approximately; 0: none, read `data.train`."""
    level: Literal["simple", "medium", "complex"] = "simple"
    """Grammar that generates the text."""
    vocab_size: int = 400
    """Vocabulary of the tokenizer trained on the text."""


@dataclass(frozen=True)
class MixtureEntry:
    """One dataset of a mixture."""

    path: Path
    """Folder of a packed dataset."""
    weight: float
    """Share of the rows, relative to the other datasets; 0: none until a phase changes it."""


@dataclass(frozen=True)
class PhaseArgs:
    """New mixture weights from a given step."""

    from_step: int
    """First step (0-based) with these weights."""
    weights: list[float]
    """One for each dataset of the mixture, in order."""


@dataclass(frozen=True)
class DataArgs:
    """Datasets, packing, order and loading."""

    train: Path | None = None
    """Folder of a packed dataset (scripts/prepare_data.py writes DIR/train)."""
    mixture: list[MixtureEntry] = field(default_factory=list)
    """Several packed datasets instead of `train`, as a list of {path, weight}."""
    phases: list[PhaseArgs] = field(default_factory=list)
    """Changes of the mixture's weights during the run, as a list of {from_step, weights}, for example to anneal."""
    val: dict[str, Path] | Path | None = None
    """Folder of a packed dataset for validation; or several by name, {NAME: FOLDER, ...}, each with columns of its own
    in metrics.csv (val_loss/NAME). Default: no validation."""
    packing: Literal["concat", "best_fit", "pad"] = "concat"
    """How documents fill rows. `concat`: cut the stream of documents into windows. `best_fit`: cut only documents
    longer than a row, and place each piece where it fits most tightly. `pad`: a row for each document."""
    plan_dir: Path | None = None
    """Folder for the row plans of best_fit and pad, built when first needed. Default: `plans` in each dataset."""
    shuffle_block_rows: int = 0
    """Shuffle in two levels, so that reads stay local: blocks of this many neighbouring rows, then rows within groups
    of blocks. 0: shuffle all rows."""
    shuffle_group_blocks: int = 64
    """Blocks in a group of the two-level shuffle."""
    document_mask: bool = True
    """Separate the documents of a row: no attention and no target across document boundaries."""
    prefetch_steps: int = 2
    """Steps that the loader thread reads ahead."""
    cache_dir: Path | None = None
    """Folder on the node (/dev/shm or a local disk) where data is staged ahead of use. Default: no staging."""
    cache_gb: float = 16.0
    """Size limit of cache_dir, shared by all processes of the node, in GB (10^9 bytes)."""
    mock: bool = False
    """Repeat the first step's batch, to measure training without a loader. Nothing is recorded."""
    datapoints: bool = True
    """Write the record of every token span seen in training (RUN/datapoints)."""
    synthetic: SyntheticArgs = field(default_factory=SyntheticArgs)
    """Generate the data instead of reading it."""
    allow_tokenizer_mismatch: bool = False
    """Train even if the tokenizer of `val`, of `init_from` or of a teacher differs from that of `train`."""

    def __post_init__(self) -> None:
        if not 1 <= self.prefetch_steps <= MAX_PREFETCH:
            raise ValueError(f"--data.prefetch_steps {self.prefetch_steps} must be between 1 and {MAX_PREFETCH}")
        if self.shuffle_block_rows < 0 or self.shuffle_group_blocks < 1:
            raise ValueError(
                f"--data.shuffle_block_rows {self.shuffle_block_rows} must not be negative, "
                f"--data.shuffle_group_blocks {self.shuffle_group_blocks} must be at least 1"
            )
        if not 0.1 <= self.cache_gb < float("inf"):
            raise ValueError(f"--data.cache_gb {self.cache_gb} must be at least 0.1 (several chunks of 16 MB)")
        self._check_val()
        if self.phases and not self.mixture:
            raise ValueError("--data.phases changes the weights of --data.mixture, which is not given")
        steps = [0, *(phase.from_step for phase in self.phases)]
        if any(a >= b for a, b in pairwise(steps)):
            raise ValueError(f"--data.phases begin at steps {steps[1:]}; they must increase, starting at 1 or later")
        for phase in self.phases:
            if len(phase.weights) != len(self.mixture):
                raise ValueError(
                    f"--data.phases: the phase from step {phase.from_step} has {len(phase.weights)} weights, "
                    f"--data.mixture has {len(self.mixture)} datasets"
                )

    def _check_val(self) -> None:
        if isinstance(self.val, Path) and str(self.val).lstrip()[:1] in ("{", "["):
            raise ValueError(f"--data.val {self.val} is neither a folder nor {{NAME: FOLDER, ...}}")
        if self.val == {}:
            raise ValueError("--data.val {} names no dataset: leave it out, or give a folder or {NAME: FOLDER, ...}")
        for name in self.val if isinstance(self.val, dict) else ():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", str(name)):
                raise ValueError(
                    f"--data.val: the name {name!r} becomes a column of metrics.csv: use letters (a to z), digits and "
                    "any of . _ -"
                )


@dataclass(frozen=True)
class TrainArgs:
    """Run length, batch sizes, memory options."""

    max_steps: int | None = None
    """Run length in optimizer steps. Give exactly one of max_steps, max_tokens, max_epochs."""
    max_tokens: int | None = None
    """Run length in tokens (rounded up to a whole step)."""
    max_epochs: float | None = None
    """Run length in passes over the data (empty rows fill up the last step)."""
    global_batch_samples: int = 32
    """Rows per optimizer step, over all devices."""
    micro_batch_samples: int | Literal["auto"] = 8
    """Rows per forward and backward pass on one device; auto: the largest number that divides the batch and fits in
    memory, measured on CUDA, else estimated (docs/performance.md)."""
    block_size: int | None = None
    """Tokens per row. Default: the model's maximum context."""
    clip_norm: float = 1.0
    """Maximum global gradient norm; 0: no clipping."""
    z_loss: float = 0.0
    """Weight of the z-loss, the squared log of the softmax normalizer, which keeps logits from drifting (PaLM: 1e-4);
    0: off."""
    load_balance_loss: float | None = None
    """Weight of the load-balancing loss of the experts (Switch Transformers, eq. 4), over the tokens of one device's
    micro-batch, so it depends on the micro-batch size. Default: 0.001 for a model with experts."""
    router_z_loss: float | None = None
    """Weight of the router's z-loss (ST-MoE: 1e-3), over the same tokens. Default: 0."""
    activation_checkpointing: Literal["none", "full", "block", "op", "auto"] = "none"
    """Recomputation in the backward pass, to save memory. `full`: every block (about a third more compute). `block`:
    every n-th block. `op`: every block, except for matrix products and attention. `auto`: as few blocks as fit in
    memory."""
    activation_checkpointing_every: int = 2
    """n of `activation_checkpointing: block`."""
    activation_checkpointing_blocks: int | None = None
    """With `activation_checkpointing: block`: how many blocks to recompute, from the first, instead of every n-th."""
    memory_limit_gib: float | None = None
    """Memory of a device that the `auto` settings may use, in GiB; no effect without them. Default: most of its free
    memory."""
    cpu_offload: bool = False
    """FSDP: keep parameters, gradients and optimizer state in host memory; slow."""
    prefetch_blocks: int = 0
    """FSDP: blocks whose parameters are gathered ahead of use; 0: FSDP's default, one block."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """FSDP: precision of the gradient reduction over ranks."""
    defer_gradient_sync: bool = False
    """FSDP: reduce gradients once per step instead of once per micro-batch; needs memory for unsharded gradients."""
    deterministic: bool = False
    """Use only deterministic kernels, so that runs repeat bit for bit on CUDA too; somewhat slower."""
    topology_invariant: bool = False
    """Compute the same bits on any number of devices, under DDP and FSDP, by exact sums of gradients. Implies
    `deterministic`; costs memory, bandwidth and time (docs/reproducibility.md)."""
    fp8_keep_ends: bool = False
    """With --precision fp8: leave the first and the last block in bf16."""
    attention: Literal["auto", "fa4", "fa3", "fa2", "varlen", "sdpa", "loop", "dense"] = "auto"
    """Attention kernel, one of lit_model/kernels/; auto: the fastest that runs here. `dense` is for tests."""
    loss_kernel: Literal["auto", "fused", "plain"] = "auto"
    """Cross-entropy: `fused` in one Triton kernel (CUDA, bf16 or fp16), or `plain` operations of torch; auto: fused
    where it runs. The loss of a student beside its teachers is always plain."""

    def __post_init__(self) -> None:
        lengths = {k: getattr(self, k) for k in ("max_steps", "max_tokens", "max_epochs")}
        given = {k: v for k, v in lengths.items() if v is not None}
        if len(given) != 1:
            got = ", ".join(f"--train.{k} {v}" for k, v in given.items()) or "none"
            raise ValueError(
                f"give exactly one of --train.max_steps, --train.max_tokens, --train.max_epochs; got {got}"
            )
        for name, value in given.items():
            if value <= 0:
                raise ValueError(f"--train.{name} {value} must be positive")
        automatic = self.micro_batch_samples == AUTO
        check_least(self, "train.", global_batch_samples=1, block_size=1, activation_checkpointing_every=1)
        check_least(
            self, "train.", activation_checkpointing_blocks=0, **({} if automatic else {"micro_batch_samples": 1})
        )
        if self.activation_checkpointing_blocks is not None and self.activation_checkpointing != "block":
            raise ValueError(
                f"--train.activation_checkpointing_blocks {self.activation_checkpointing_blocks} needs "
                "--train.activation_checkpointing block"
            )
        if self.memory_limit_gib is not None and not 0 < self.memory_limit_gib < float("inf"):
            raise ValueError(f"--train.memory_limit_gib {self.memory_limit_gib} must be a positive number")
        for name in ("global_batch_samples",) if automatic else ("global_batch_samples", "micro_batch_samples"):
            if getattr(self, name) > MAX_BATCH:
                raise ValueError(f"--train.{name} {getattr(self, name)}: at most {MAX_BATCH} rows are supported")
        for name in ("clip_norm", "z_loss", "load_balance_loss", "router_z_loss", "prefetch_blocks"):
            if not 0 <= (getattr(self, name) or 0) < float("inf"):
                raise ValueError(f"--train.{name} {getattr(self, name)} must not be negative; 0 turns it off")

    @property
    def only_deterministic(self) -> bool:
        """Whether only deterministic kernels are used."""
        return self.deterministic or self.topology_invariant

    @property
    def is_automatic(self) -> bool:
        """Whether a setting is to be chosen by the memory of the device."""
        return AUTO in (self.micro_batch_samples, self.activation_checkpointing)

    @property
    def micro_batch(self) -> int:
        """micro_batch_samples, once `auto` has been replaced (pretrain/memory_fit.py)."""
        assert isinstance(self.micro_batch_samples, int), "micro_batch_samples auto must be resolved first"
        return self.micro_batch_samples


@dataclass(frozen=True)
class OptimArgs:
    """Optimizer and learning rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon: Muon for the matrices inside the blocks and AdamW for everything else (embeddings, head, routers,
    norms, biases), with the same lr and weight_decay."""
    lr: float = 3e-4
    """Peak learning rate."""
    lr_min: float = 0.0
    """Learning rate at the last step (with a decaying schedule)."""
    warmup_steps: int = 0
    """Steps of linear warmup; the first step has lr / warmup_steps."""
    warmup_fraction: float | None = None
    """Warmup as a fraction of the run's steps, for example 0.01, instead of warmup_steps."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Decay from lr to lr_min after the warmup. wsd (warmup, stable, decay): constant until the last decay_steps."""
    decay_steps: int = 0
    """wsd: steps of the decay, the last ones of the run."""
    decay_fraction: float | None = None
    """wsd: decay as a fraction of the run's steps, for example 0.2, instead of decay_steps."""
    decay_shape: Literal["sqrt", "linear", "cosine", "square"] = "sqrt"
    """wsd: factor of lr - lr_min after a share x of the decay: sqrt 1 - sqrt(x), linear 1 - x, cosine
    (1 + cos(pi x)) / 2, square 1 - x^2."""
    steps_before: int = 0
    """Schedule steps already completed by the --init_from model; the schedule starts after them."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW: decay rate of the first moment (mean of gradients)."""
    beta2: float = 0.95
    """AdamW: decay rate of the second moment (mean of squared gradients)."""
    eps: float = 1e-8
    """AdamW: added to the square root of the second moment."""
    momentum: float = 0.95
    """Muon: decay rate of the momentum (mean of gradients, Nesterov)."""

    def __post_init__(self) -> None:
        if not 0 <= self.lr_min <= self.lr:
            raise ValueError(f"--optim.lr_min {self.lr_min} must be between 0 and --optim.lr {self.lr}")
        for part in ("warmup", "decay"):
            steps, fraction = getattr(self, f"{part}_steps"), getattr(self, f"{part}_fraction")
            if fraction is not None and steps:
                raise ValueError(
                    f"give --optim.{part}_steps or --optim.{part}_fraction, not both; got {steps} and {fraction}"
                )
            if fraction is not None and not 0 <= fraction <= 1:
                raise ValueError(f"--optim.{part}_fraction {fraction} must be between 0 and 1")
        check_least(self, "optim.", warmup_steps=0, steps_before=0, decay_steps=0)
        if self.schedule == "wsd" and not (self.decay_steps or self.decay_fraction):
            raise ValueError("--optim.schedule wsd needs --optim.decay_steps or --optim.decay_fraction")
        for name in ("decay_steps", "decay_fraction", "decay_shape"):
            if self.schedule != "wsd" and getattr(self, name) != getattr(OptimArgs, name):
                raise ValueError(f"--optim.{name} {getattr(self, name)} is for --optim.schedule wsd")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--optim.{name} {getattr(self, name)} must be in [0, 1)")
        if self.name != "muon" and self.momentum != OptimArgs.momentum:
            raise ValueError(f"--optim.momentum {self.momentum} is for --optim.name muon")

    def resolved(self, max_steps: int) -> "OptimArgs":
        """A copy with warmup and decay in steps, for a run of `max_steps` (steps_before not included)."""
        total, args = max_steps + self.steps_before, self
        if args.warmup_fraction is not None:
            args = replace(args, warmup_steps=round(args.warmup_fraction * total), warmup_fraction=None)
        if args.decay_fraction is not None:
            args = replace(args, decay_steps=max(1, round(args.decay_fraction * total)), decay_fraction=None)
        return args


@dataclass(frozen=True)
class TeacherEntry:
    """One teacher of an ensemble."""

    path: Path
    """A run folder, a checkpoint, or a Hugging Face folder."""
    weight: float = 1.0
    """Weight in the ensemble, relative to the other teachers."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"--distillation.teachers: weight {self.weight} of {self.path} must be positive")


@dataclass(frozen=True)
class DistillationArgs:
    """Teachers and the distillation loss, with --objective distillation."""

    teachers: list[TeacherEntry] = field(default_factory=list)
    """Teachers of any family and size that share the data's tokenizer: [{path: a, weight: 1}, {path: b, weight: 1}]."""
    cache: Path | None = None
    """Folder written by scripts/cache_teacher.py, instead of live teachers."""
    divergence: Literal["forward_kl", "reverse_kl", "js", "mse", "topk_kl"] = "forward_kl"
    """Divergence of teachers and student: forward_kl KL(teacher || student), reverse_kl KL(student || teacher), js
    Jensen-Shannon, mse mean squared error of the logits, topk_kl forward KL over the teacher's top_k tokens with all
    other tokens in one bucket."""
    top_k: int | None = None
    """Tokens of topk_kl. Default with a cache: all that it holds."""
    temperature: float = 2.0
    """Softmax temperature of teachers and student; the divergence is multiplied by its square."""
    alpha: float = 0.5
    """Weight of the cross-entropy; the divergence has weight 1 - alpha."""
    alpha_end: float | None = None
    """alpha at the last step. Default: constant alpha."""
    alpha_schedule: Literal["linear", "cosine"] = "linear"
    """Interpolation from alpha to alpha_end."""
    ensemble: Literal["logits", "probabilities"] = "logits"
    """Quantity averaged over the teachers."""
    reduction: Literal["per_token", "babyllama"] = "per_token"
    """per_token: average the divergence over tokens, like the cross-entropy. babyllama: sum over the tokens of a row
    and average over rows, which multiplies its weight by the row length."""
    teacher_precision: Literal["fp32", "bf16"] | None = None
    """Precision of the teachers. Default: that of the run."""
    teacher_device: str | None = None
    """Device of the teachers, for example cuda:1 next to a student on cuda:0. Default: the student's device."""
    shard_teachers: bool = False
    """With --strategy fsdp: shard the teachers' blocks as well. Default: every device holds whole teachers."""
    compile_teachers: bool = False
    """Compile each block of the teachers."""

    def __post_init__(self) -> None:
        for name in ("alpha", "alpha_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--distillation.{name} {value} is not in [0, 1]")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"--distillation.temperature {self.temperature} must be positive")
        check_least(self, "distillation.", top_k=1)
        if self.top_k is not None and self.divergence != "topk_kl":
            raise ValueError(f"--distillation.top_k {self.top_k} is for --distillation.divergence topk_kl")
        if self.top_k is None and self.divergence == "topk_kl" and self.cache is None:
            raise ValueError("--distillation.divergence topk_kl needs --distillation.top_k")
        if self.teacher_device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.teacher_device):
            raise ValueError(f"--distillation.teacher_device {self.teacher_device} is not cpu, cuda or cuda:N")
        if self.divergence == "mse" and self.ensemble != "logits":
            raise ValueError("--distillation.divergence mse compares logits: give --distillation.ensemble logits")
        if self.cache is not None and self.teachers:
            raise ValueError("give --distillation.teachers or --distillation.cache, not both")
        for name in LIVE_TEACHERS_ONLY:
            if self.cache is not None and getattr(self, name):
                raise ValueError(f"--distillation.{name} is for live teachers: remove it, or --distillation.cache")
        if self.cache is not None and self.divergence not in ("forward_kl", "topk_kl"):
            raise ValueError(
                f"--distillation.divergence {self.divergence} needs the full teacher distribution; a cache supports "
                "topk_kl, and forward_kl if it holds the whole vocabulary"
            )


MILLION = 10**6
BABYLM = (*range(MILLION, 10 * MILLION, MILLION), *range(10 * MILLION, 101 * MILLION, 10 * MILLION))
WORD_BUDGETS = {"babylm": BABYLM, "babylm_strict": (*BABYLM, *range(200 * MILLION, 1001 * MILLION, 100 * MILLION))}


def word_budgets(text: int | str) -> tuple[int, ...]:
    """The budgets that one value of --save.at_words names: 2M -> (2000000,)."""
    if text in WORD_BUDGETS:
        return WORD_BUDGETS[str(text)]
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", str(text).replace("_", "").upper())
    if match is not None:
        words = Decimal(match[1]) * 1000 ** " KMB".index(match[2] or " ")
        if words == int(words) and 1 <= words <= MAX_NUMBER:
            return (int(words),)
    raise ValueError(
        f"--save.at_words {text}: give numbers of words, such as 500K, 2M or 1.5B, or {' or '.join(WORD_BUDGETS)}"
    )


@dataclass(frozen=True)
class SaveArgs:
    """Checkpoints and their retention."""

    every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    state_dict_type: Literal["full", "sharded"] = "full"
    """`full`: one file. `sharded`: a folder with a part from every rank."""
    keep_last: int = 0
    """Newest checkpoints to keep; 0: all."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are never deleted; 0: none is protected."""
    asynchronous: bool = False
    """Copy the state to host memory and write it in the background; needs that memory."""
    at_words: list[int | str] | str = field(default_factory=list)
    """Also save at the first step at or past these numbers of words seen (repeats count), and never delete these
    checkpoints: for example 1M,2M,5M. `babylm`: 1 to 10M by 1M, 20 to 100M by 10M; `babylm_strict`: also 200 to 1000M
    by 100M. The data's words must be counted."""
    hf: bool = False
    """At the end of the run, write its model as a Hugging Face folder, RUN/hf."""
    on_error: Literal["stop", "skip"] = "stop"
    """If a checkpoint cannot be written (a full disk): `stop` the run, or `skip` this checkpoint with a warning."""

    def __post_init__(self) -> None:
        check_least(self, "save.", every_steps=1, keep_last=0, keep_every=0)
        texts = re.split(r"[\s,]+", self.at_words.strip("[] ")) if isinstance(self.at_words, str) else self.at_words
        object.__setattr__(self, "at_words", sorted({n for text in texts if text != "" for n in word_budgets(text)}))

    @property
    def word_budgets(self) -> list[int]:
        """The numbers of words of `at_words`, ascending."""
        return [int(words) for words in self.at_words]


@dataclass(frozen=True)
class EvalArgs:
    """Validation and evaluation: at step 0, at regular intervals, and at the last step."""

    every_steps: int = 1000
    """Steps between validations."""
    max_samples: int | None = None
    """Rows per validation, of each set. Default: all of data.val."""
    micro_batch_samples: int | None = None
    """Rows per forward pass on one device. Default: train.micro_batch_samples."""
    tasks: list[str] = field(default_factory=list)
    """Tasks to run during training: names, task files or folders of them (docs/evaluation.md). Each is a column
    `eval/NAME` of metrics.csv."""
    prompts: Path | None = None
    """Prompts to continue during training: a text file with one a line, or .jsonl with the field `prompt`. The texts go
    to RUN/evaluations.jsonl."""
    tasks_every_steps: int | None = None
    """Steps between evaluations of tasks and prompts. Default: eval.every_steps."""
    tasks_every_tokens: int | None = None
    """The same in tokens of rows, padding included, instead of steps."""
    tasks_every_words: int | None = None
    """The same in words seen, of data whose words are counted (scripts/count_words.py): after the first step at or past
    each multiple."""
    max_items: int | None = None
    """Items of each task, evenly spaced. Default: all."""
    sample_tokens: int = 64
    """Tokens to write after each prompt, as many as fit the context."""
    sample_temperature: float = 0.8
    """Temperature of their sampling; 0: the most probable token."""

    def __post_init__(self) -> None:
        check_least(self, "eval.", every_steps=1, max_samples=1, micro_batch_samples=1)
        units = ("tasks_every_steps", "tasks_every_tokens", "tasks_every_words")
        check_least(self, "eval.", **dict.fromkeys(units, 1), max_items=1, sample_tokens=1, sample_temperature=0)
        given = [f"--eval.{unit}" for unit in units if getattr(self, unit) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are mutually exclusive")


TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class LogArgs:
    """Metrics and trackers."""

    every_steps: int = 10
    """Steps between rows of metrics.csv; each row waits once for the device."""
    trackers: list[str] | str = field(default_factory=list)
    """Trackers in addition to metrics.csv: tensorboard, wandb, or both separated by a comma."""
    project: str = "llammlein"
    """Project name in the tracker."""
    run_name: str | None = None
    """Run name in the tracker. Default: the name of out_dir."""
    layers: bool = False
    """At log steps, also write the norms of each layer's gradients, activations and updates to layers.csv and the
    trackers. Needs memory for a copy of the weights."""
    report: bool = True
    """Write RUN/report.html at the end of the run; scripts/report.py writes it at any time."""

    def __post_init__(self) -> None:
        check_least(self, "log.", every_steps=1)
        if isinstance(self.trackers, str):
            names = [name for name in re.split(r"[\s,]+", self.trackers.strip("[] ")) if name]
        else:
            names = self.trackers
        object.__setattr__(self, "trackers", list(dict.fromkeys(names)))
        for name in self.trackers:
            if name not in TRACKERS:
                hint = did_you_mean(name, TRACKERS)
                raise ValueError(f"--log.trackers {name}: unknown tracker; choose {' or '.join(TRACKERS)}{hint}")


@dataclass(frozen=True)
class ProfileArgs:
    """A profile of steady steps: a trace, a table of where their time goes, and on CUDA a memory snapshot."""

    steps: int = 0
    """Steps to profile, on rank 0; these alone become slower. The table is printed, and everything written to
    RUN/profile (docs/performance.md). 0: no profile."""
    start: int = 5
    """Steps of this process before the profile, for example to compile; one more step warms the profiler up."""

    def __post_init__(self) -> None:
        check_least(self, "profile.", steps=0, start=1)
        if self.steps > MAX_PROFILE:
            raise ValueError(f"--profile.steps {self.steps}: at most {MAX_PROFILE} steps are supported")

    @property
    def needed_steps(self) -> int:
        """Steps of the run by the end of the profile."""
        return self.start + 1 + self.steps


@dataclass(frozen=True)
class GuardArgs:
    """Non-finite gradients, loss spikes and hangs."""

    max_skipped_steps: int = 100
    """End the run after this many consecutive steps skipped for non-finite gradients."""
    spike_action: Literal["none", "warn", "rollback"] = "warn"
    """Action on a loss spike. `rollback`: resume from the last checkpoint before the spike and skip the samples since
    then."""
    spike_sigmas: float = 6.0
    """A logged loss is high if it is this many standard deviations above the mean of the window before it."""
    spike_window: int = 64
    """Baseline window, in logged losses; active once half full."""
    spike_rows: int = 3
    """Consecutive high losses that make a spike."""
    max_rollbacks: int = 3
    """End the run at the next spike after this many rollbacks."""
    hang_timeout_s: int = 900
    """Seconds without progress after which every rank dumps its stacks to its log and the run ends; 0: never."""

    def __post_init__(self) -> None:
        check_least(self, "guard.", max_skipped_steps=1, spike_rows=1, spike_window=4)
        for name in ("spike_sigmas", "max_rollbacks", "hang_timeout_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--guard.{name} {getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class StopArgs:
    """Early stop: on SIGTERM, SIGUSR1, Ctrl-C or a time limit, save a checkpoint and end."""

    after_minutes: float | None = None
    """Stop this many minutes after the start of the process, as on SIGTERM. For queues with a time limit: leave time
    for one step and one save."""
    exit_code: int = 0
    """Exit status of a run that was stopped and saved; 130 after Ctrl-C."""
    requeue: bool = False
    """Call `scontrol requeue` for this SLURM job after saving, where it is available (not inside a container)."""

    def __post_init__(self) -> None:
        if not 0 <= self.exit_code <= 255:
            raise ValueError(f"--stop.exit_code {self.exit_code} must be between 0 and 255")
        if self.after_minutes is not None and not self.after_minutes > 0:
            raise ValueError(f"--stop.after_minutes {self.after_minutes} must be greater than 0")


Sharding = Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"]
# Settings that --train.topology_invariant excludes, and what to give instead.
NOT_INVARIANT: tuple[tuple[str, str | bool, str], ...] = (
    ("precision", "fp16", "use bf16 or fp32"),
    ("precision", "fp8", "use bf16"),
    ("optim.name", "muon", "use adamw"),
    ("train.micro_batch_samples", AUTO, "give the number of rows, the same on every number of devices"),
    ("train.defer_gradient_sync", True, "every micro-batch's gradients are reduced separately"),
    ("train.reduce_dtype", "bf16", "gradients are reduced in float64"),
    ("distillation.shard_teachers", True, "sharded teachers compute in another precision"),
)


@dataclass(frozen=True)
class RunArgs:
    """One pretraining run. The sections are documented by the docstrings of their classes."""

    train: TrainArgs
    out_dir: Path | None = None
    """Run folder. Default: runs/NAME-DATE-TIME."""
    devices: int | Literal["auto"] = "auto"
    """Devices (processes) per node; auto: all GPUs, or one CPU process."""
    num_nodes: int = 1
    """Number of nodes."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device type."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Parallelism; auto: ddp with several devices, none with one."""
    sharding_strategy: Sharding = "FULL_SHARD"
    """FSDP: FULL_SHARD shards parameters, gradients and optimizer state; SHARD_GRAD_OP keeps parameters gathered
    between forward and backward; HYBRID_SHARD shards within a node and replicates across nodes; NO_SHARD is ddp."""
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Compute precision; master weights are always fp32. `fp8`: bf16, with the blocks' linear layers in float8 during
    training, for wide models on Hopper, Ada or newer GPUs; needs --compile true there."""
    compile: bool = False
    """Compile each block with torch.compile."""
    resume: str | None = None
    """Resume from a checkpoint: latest, auto (latest, or a fresh start if there is none), iter-XXXXXXXX-ckpt.pth in
    out_dir, or a path."""
    resume_allow: str | list[str] = field(default_factory=list)
    """Settings allowed to differ from the checkpoint when resuming, for example train.max_steps,data."""
    preflight: bool = False
    """Check devices, network, disk, data, memory and one step with the real shapes, print the findings, and end."""
    init_from: Path | None = None
    """Start from the weights of a checkpoint or a Hugging Face folder instead of a random initialization."""
    init_optimizer: bool = False
    """Also load the optimizer's state and update count from init_from. The data starts at its first row."""
    init_layers: list[int] | None = None
    """Layers of init_from (numbered from 0) to start from, for a student built from some of its teacher's layers."""
    objective: Literal["cross_entropy", "distillation"] = "cross_entropy"
    """Loss: cross-entropy, or cross-entropy and the divergence from teachers."""
    seed: int = 1337
    """Random seed of initialization, data order and dropout."""
    timeout_s: int = 1800
    """Timeout of collective operations, in seconds."""
    model: ModelArgs = field(default_factory=ModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    distillation: DistillationArgs = field(default_factory=DistillationArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    save: SaveArgs = field(default_factory=SaveArgs)
    eval: EvalArgs = field(default_factory=EvalArgs)
    log: LogArgs = field(default_factory=LogArgs)
    profile: ProfileArgs = field(default_factory=ProfileArgs)
    guard: GuardArgs = field(default_factory=GuardArgs)
    stop: StopArgs = field(default_factory=StopArgs)

    def __post_init__(self) -> None:
        if isinstance(self.resume_allow, str):
            names = [name.strip() for name in self.resume_allow.split(",") if name.strip()]
            object.__setattr__(self, "resume_allow", names)
        d, sharded = self.distillation, self.strategy == "fsdp" and self.sharding_strategy != "NO_SHARD"
        if (self.objective == "distillation") != (bool(d.teachers) or d.cache is not None):
            raise ValueError(
                f"--objective {self.objective}: --distillation.teachers (or --distillation.cache) and --objective "
                "distillation need each other"
            )
        if d.cache is not None and self.data.train is None:
            raise ValueError("--distillation.cache covers one dataset: give --data.train")
        if d.shard_teachers and not sharded:
            raise ValueError("--distillation.shard_teachers true needs --strategy fsdp (not NO_SHARD)")
        if d.shard_teachers and d.teacher_device is not None:
            raise ValueError("--distillation.shard_teachers and teacher_device exclude each other")
        if self.init_layers is not None and (self.init_from is None or not self.init_layers):
            raise ValueError("--init_layers selects layers of --init_from: give both")
        for flag in SHARDED_ONLY:
            if getattr(self.train, flag) and not sharded:
                raise ValueError(f"--train.{flag} {getattr(self.train, flag)} needs --strategy fsdp (not NO_SHARD)")
        if self.optim.name == "muon" and self.train.cpu_offload:
            raise ValueError(
                "--optim.name muon and --train.cpu_offload exclude each other: Muon's matrix products would run on the "
                "host, which takes many times as long as the step"
            )
        if self.train.topology_invariant:
            self._check_topology_invariant()
        if self.train.fp8_keep_ends and self.precision != "fp8":
            raise ValueError(f"--train.fp8_keep_ends true is for --precision fp8, not {self.precision}")
        check_least(self, "", num_nodes=1)
        if isinstance(self.devices, int):
            check_least(self, "", devices=1)
            if self.devices > MAX_DEVICES:
                raise ValueError(f"--devices {self.devices}: at most {MAX_DEVICES} devices per node are supported")
        if (self.data.train is not None) + bool(self.data.mixture) + bool(self.data.synthetic.tokens) != 1:
            raise ValueError(
                "give one of --data.train (a packed dataset), --data.mixture (several) and --data.synthetic.tokens "
                "(generated text)"
            )
        if self.data.mixture and self.train.max_epochs is not None:
            raise ValueError(
                f"--train.max_epochs {self.train.max_epochs}: the datasets of --data.mixture have different "
                "lengths; give --train.max_steps or --train.max_tokens"
            )
        if self.data.synthetic.tokens and self.data.val is not None:
            raise ValueError(
                "--data.val and --data.synthetic.tokens exclude each other: synthetic data has its own validation split"
            )
        if self.data.mock and self.save.at_words:
            raise ValueError("--data.mock repeats one batch, so it has no words to save at: remove --save.at_words")
        if self.init_from is not None and self.model.name is not None:
            raise ValueError("--init_from determines the model's sizes: remove --model.name")
        if self.init_optimizer and self.init_layers is not None:
            raise ValueError("--init_optimizer and --init_layers exclude each other: the state covers all layers")
        if self.init_optimizer and self.init_from is None:
            raise ValueError("--init_optimizer true needs --init_from, the checkpoint to take the state from")
        if self.data.synthetic.tokens > MAX_SYNTHETIC:
            raise ValueError(
                f"--data.synthetic.tokens {self.data.synthetic.tokens}: at most {MAX_SYNTHETIC} are supported; prepare "
                "a dataset with scripts/prepare_data.py"
            )
        for flag, seconds in (("timeout_s", self.timeout_s), ("guard.hang_timeout_s", self.guard.hang_timeout_s)):
            if seconds > MAX_SECONDS:
                raise ValueError(f"--{flag} {seconds}: at most {MAX_SECONDS} s are supported")
        for flag, value in flat(plain(self)).items():
            if flag != "seed" and isinstance(value, int) and abs(value) > MAX_NUMBER:
                raise ValueError(f"--{flag} {value}: at most 2^52 are supported")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed} must be in [0, 2^63)")

    def _check_topology_invariant(self) -> None:
        """Raise ValueError for a setting whose results depend on the number of devices."""
        given = flat(plain(self))
        for flag, value, instead in NOT_INVARIANT:
            if given[flag] == value:
                shown = str(value).lower()
                raise ValueError(f"--train.topology_invariant true and --{flag} {shown} exclude each other: {instead}")

    def resolved(self, out_dir: Path, max_steps: int, teachers: list[Path]) -> "RunArgs":
        """A copy with the values that the run folder, the data and the checkpoints of its teachers determine."""
        entries = [replace(entry, path=path) for entry, path in zip(self.distillation.teachers, teachers, strict=True)]
        distillation = replace(self.distillation, teachers=entries)
        return replace(self, out_dir=out_dir, optim=self.optim.resolved(max_steps), distillation=distillation)


def plain(value: Any) -> Any:
    """A dataclass as nested dictionaries of values that YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return value


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"max_steps": 3}} -> {"train.max_steps": 3}. The names of validation sets are no settings."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        out.update(flat(value, f"{name}.") if isinstance(value, dict) and name != "data.val" else {name: value})
    return out
