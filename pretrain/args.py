"""The dataclasses that are the command line: every field is a flag, its docstring the help.

Nothing here touches torch: a wrong value is refused before anything heavy is imported. Annotations are not postponed
(`from __future__ import annotations`), since jsonargparse would parse this file again for each class: 0.3 s a start.
"""

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from lit_model.config import ModelConfig
from lit_model.registry import get_config

# Far beyond any run, and small enough that what follows from them fits in memory and in 64 bits.
MAX_BATCH = 1 << 20  # rows; a step's rows are planned together
MAX_PREFETCH = 1 << 12
MAX_DEVICES = 1 << 10
MAX_SYNTHETIC = 10**10
MAX_SECONDS = 10**9
MAX_NUMBER = 1 << 52


def optional_fields(config: type, leave_out: Collection[str]) -> list[tuple[str, Any, Any]]:
    """The fields of a config for `make_dataclass`, all optional; what is a tuple there is a list, as in YAML."""
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
        "ModelFields", optional_fields(ModelConfig, leave_out=("block_size", "padded_vocab_size", "family"))
    )


@dataclass
class ModelArgs(ModelFields):
    """Model. Fields that are not given come from the registry's entry `name`; they are those of ModelConfig."""

    name: str | None = None
    """Name in lit_model/registry.py, for example LLaMmlein_120M. Without it give the sizes."""
    vocab_size: int | None = None
    """Number of token ids. Default: the dataset's."""

    def config(self, vocab_size: int, block_size: int | None) -> ModelConfig:
        """The model's config: the registry's entry with what is set here, and the data's vocabulary."""
        given: dict[str, Any] = {k: v for k, v in vars(self).items() if v is not None and k != "name"}
        given.setdefault("vocab_size", vocab_size)
        if self.name is not None:
            config = get_config(self.name, **given)
        else:
            missing = [f for f in ("n_layer", "n_head", "n_embd", "intermediate_size") if f not in given]
            if missing:
                flags = " ".join(f"--model.{f}" for f in missing)
                raise ValueError(f"the model is not complete: give --model.name (a registered model) or {flags}")
            if block_size is not None:
                given["block_size"] = block_size
            config = ModelConfig(**given)
        if block_size is not None and block_size > config.block_size:
            raise ValueError(
                f"--train.block_size {block_size} exceeds the model's maximum context of {config.block_size} tokens "
                f"(--model.name {self.name})"
            )
        return config


@dataclass
class SyntheticArgs:
    """Text made by a grammar, for trials without data; it is written, tokenized and packed in OUT_DIR/data."""

    tokens: int = 0
    """About how many words to make; 0: none, `data.train` is read."""
    level: Literal["simple", "medium", "complex"] = "simple"
    """Which grammar."""
    vocab_size: int = 400
    """Size of the tokenizer that is trained on the text."""


@dataclass
class MixtureEntry:
    """One dataset of a mixture."""

    path: Path
    """Folder of a packed dataset."""
    weight: float
    """Its share of the rows, relative to the others'; 0: none until a phase says otherwise."""


@dataclass
class PhaseArgs:
    """Other weights from a step on."""

    from_step: int
    """The first step (0-based) with these weights."""
    weights: list[float]
    """One for each dataset of the mixture, in its order."""


@dataclass
class DataArgs:
    """What is read."""

    train: Path | None = None
    """Folder of a packed dataset (scripts/prepare_data.py writes DIR/train)."""
    mixture: list[MixtureEntry] = field(default_factory=list)
    """Several packed datasets instead of `train`, as a list of {path, weight}."""
    phases: list[PhaseArgs] = field(default_factory=list)
    """Changes of the mixture's weights, as a list of {from_step, weights}, for example to anneal."""
    val: Path | None = None
    """Folder of a packed dataset for validation; without it there is none."""
    packing: Literal["concat", "best_fit", "pad"] = "concat"
    """How documents fill rows: `concat` cuts the stream of documents into windows; `best_fit` cuts only documents that
    are longer than a row, and puts the rest where it leaves the least room; `pad` gives each document its own row."""
    plan_dir: Path | None = None
    """Where the plans of best_fit and pad lie, which are made when first needed. Default: `plans` in each dataset."""
    shuffle_block_rows: int = 0
    """Shuffle blocks of so many neighbouring rows, then rows inside groups of blocks: reads stay local. 0: all rows."""
    shuffle_group_blocks: int = 64
    """Blocks in a group."""
    document_mask: bool = True
    """Keep the documents of a row apart: no attention and no target across a document's end."""
    prefetch_steps: int = 2
    """Steps read ahead by the loader's thread."""
    cache_dir: Path | None = None
    """Folder on the node (/dev/shm or a local disk) to which data is copied ahead of its use. Default: no copies."""
    cache_gb: float = 16.0
    """Budget of cache_dir for all processes of the node together, GB (10^9 bytes)."""
    mock: bool = False
    """Give the first step again and again, to measure training without a loader. Nothing is recorded."""
    datapoints: bool = True
    """Write the record of every span seen (RUN/datapoints)."""
    synthetic: SyntheticArgs = field(default_factory=SyntheticArgs)
    """Make the data instead of reading it."""
    allow_tokenizer_mismatch: bool = False
    """Train although `val`, the model of `init_from` or a teacher has another tokenizer than `train`."""

    def __post_init__(self) -> None:
        if not 1 <= self.prefetch_steps <= MAX_PREFETCH:
            raise ValueError(f"--data.prefetch_steps {self.prefetch_steps} must lie in 1 to {MAX_PREFETCH}")
        if self.shuffle_block_rows < 0 or self.shuffle_group_blocks < 1:
            raise ValueError(
                f"--data.shuffle_block_rows {self.shuffle_block_rows} must not be negative, "
                f"--data.shuffle_group_blocks {self.shuffle_group_blocks} must be at least 1"
            )
        if not 0.1 <= self.cache_gb < float("inf"):
            raise ValueError(f"--data.cache_gb {self.cache_gb}: at least 0.1 GB, some chunks of 16 MB, is needed")
        if self.phases and not self.mixture:
            raise ValueError("--data.phases changes the weights of --data.mixture, which is not given")
        steps = [0, *(phase.from_step for phase in self.phases)]
        if any(a >= b for a, b in pairwise(steps)):
            raise ValueError(f"--data.phases begin at steps {steps[1:]}; they must ascend, from 1 on")
        for phase in self.phases:
            if len(phase.weights) != len(self.mixture):
                raise ValueError(
                    f"--data.phases: from step {phase.from_step} on there are {len(phase.weights)} weights for the "
                    f"{len(self.mixture)} datasets of --data.mixture"
                )


@dataclass
class TrainArgs:
    """How long and in which portions."""

    max_steps: int | None = None
    """Length of the run in optimizer steps. Exactly one of max_steps, max_tokens, max_epochs."""
    max_tokens: int | None = None
    """Length of the run in tokens (rounded up to a whole step)."""
    max_epochs: float | None = None
    """Length of the run in passes over the data (the last step may be filled with empty rows)."""
    global_batch_samples: int = 32
    """Rows in an optimizer step, over all devices."""
    micro_batch_samples: int = 8
    """Rows that one device puts through the model at once."""
    block_size: int | None = None
    """Tokens in a row. Default: the model's maximum."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's normaliser, which keeps logits from drifting (PaLM: 1e-4); 0: none."""
    load_balance_loss: float | None = None
    """Weight of the loss that keeps the experts of a mixture equally busy (Switch Transformers, eq. 4), measured on the
    tokens of one device's micro-batch: it depends on their number. Default: 0.001 for a model with experts."""
    router_z_loss: float | None = None
    """Weight of the squared log of the router softmax's normaliser (ST-MoE: 1e-3), on the same tokens. Default: 0."""
    activation_checkpointing: Literal["none", "full", "block", "op"] = "none"
    """What is recomputed in the backward to save memory: `full` each block (about a third more work), `block` every
    n-th block, `op` each block but for its matrix products and its attention."""
    activation_checkpointing_every: int = 2
    """The n of `block`."""
    cpu_offload: bool = False
    """FSDP: parameters, gradients and optimizer state lie in host memory; slow."""
    prefetch_blocks: int = 0
    """FSDP: gather the parameters of so many blocks ahead explicitly; 0: as FSDP does by itself, one ahead."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """FSDP: precision in which gradients are reduced over the ranks."""
    defer_gradient_sync: bool = False
    """FSDP: reduce gradients once a step instead of with each micro-batch; costs memory for whole gradients."""
    deterministic: bool = False
    """Only deterministic kernels: runs repeat bit for bit on CUDA too, at some cost in speed."""
    attention: str = "auto"
    """Attention kernel: auto, or one of lit_model/kernels/: fa4, fa3, fa2, varlen, sdpa, loop."""

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
        for name in ("global_batch_samples", "micro_batch_samples", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--train.{name} {value} must be at least 1")
        for name, most in (("global_batch_samples", MAX_BATCH), ("micro_batch_samples", MAX_BATCH)):
            if getattr(self, name) > most:
                raise ValueError(f"--train.{name} {getattr(self, name)}: at most {most} rows are supported")
        for name in ("clip_norm", "z_loss", "load_balance_loss", "router_z_loss", "prefetch_blocks"):
            if not 0 <= (getattr(self, name) or 0) < float("inf"):
                raise ValueError(f"--train.{name} {getattr(self, name)} must not be negative; 0 turns it off")
        if self.activation_checkpointing_every < 1:
            raise ValueError(
                f"--train.activation_checkpointing_every {self.activation_checkpointing_every} must be at least 1"
            )


@dataclass
class OptimArgs:
    """AdamW and its schedule."""

    lr: float = 3e-4
    """Peak learning rate."""
    lr_min: float = 0.0
    """Learning rate at the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up; the first step already has lr / warmup_steps."""
    warmup_fraction: float | None = None
    """Instead of warmup_steps: the warm-up as a share of the run's steps, 0.01 for example."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay from lr to lr_min after the warm-up."""
    steps_before: int = 0
    """Steps of the schedule that lie behind a model that this run goes on with (init_from): it begins after them."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        if not 0 <= self.lr_min <= self.lr:
            raise ValueError(f"--optim.lr_min {self.lr_min} must lie between 0 and --optim.lr {self.lr}")
        if self.warmup_fraction is not None and self.warmup_steps:
            raise ValueError(
                f"give --optim.warmup_steps or --optim.warmup_fraction, not both; got {self.warmup_steps} and "
                f"{self.warmup_fraction}"
            )
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"--optim.warmup_fraction {self.warmup_fraction} must lie between 0 and 1")
        for steps in ("warmup_steps", "steps_before"):
            if getattr(self, steps) < 0:
                raise ValueError(f"--optim.{steps} {getattr(self, steps)} must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--optim.{name} {getattr(self, name)} must lie in [0, 1)")

    def resolved(self, max_steps: int) -> "OptimArgs":
        """The same with the warm-up in steps, for a run of `max_steps`, those of steps_before not counted."""
        if self.warmup_fraction is None:
            return self
        steps = round(self.warmup_fraction * (max_steps + self.steps_before))
        return dataclasses.replace(self, warmup_steps=steps, warmup_fraction=None)


@dataclass
class TeacherEntry:
    """One teacher of an ensemble."""

    path: Path
    """A run folder, a checkpoint, or a Hugging Face folder."""
    weight: float = 1.0
    """Its share of the ensemble, relative to the others'."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"--distillation.teachers: weight {self.weight} of {self.path} must be positive")


@dataclass
class DistillationArgs:
    """What a student learns from its teachers, with --objective distillation."""

    teachers: list[TeacherEntry] = field(default_factory=list)
    """Any number, of any family and size, with the data's tokenizer: [{path: a, weight: 1}, {path: b, weight: 1}]."""
    cache: Path | None = None
    """What scripts/cache_teacher.py wrote, in place of the teachers."""
    divergence: Literal["forward_kl", "reverse_kl", "js", "mse", "topk_kl"] = "forward_kl"
    """Between the teachers' distribution and the student's: KL(teacher || student), KL(student || teacher),
    Jensen-Shannon; the mean squared difference of logits; or forward KL over the teacher's top_k tokens and all
    others as one."""
    top_k: int | None = None
    """Tokens of topk_kl. With a cache: those that it holds."""
    temperature: float = 2.0
    """Logits are divided by it before the softmax; the divergence is multiplied by its square."""
    alpha: float = 0.5
    """Weight of the cross-entropy with the text; the divergence has 1 - alpha."""
    alpha_end: float | None = None
    """alpha at the last step. Default: it stays."""
    alpha_schedule: Literal["linear", "cosine"] = "linear"
    """The way from alpha to alpha_end."""
    ensemble: Literal["logits", "probabilities"] = "logits"
    """What is averaged over the teachers."""
    reduction: Literal["per_token", "babyllama"] = "per_token"
    """The divergence is a mean over tokens, as the cross-entropy is, or, as in BabyLlama, a sum over the tokens of a
    row and a mean over rows, which weighs it as many times more as a row has tokens."""
    teacher_precision: Literal["fp32", "bf16"] | None = None
    """Of the teachers' weights and arithmetic. Default: the run's."""
    teacher_device: str | None = None
    """Where the teachers run, for example cuda:1 beside a student on cuda:0. Default: where the student does."""
    shard_teachers: bool = False
    """With --strategy fsdp: shard the teachers' blocks over the devices, too. Default: each device holds them whole."""
    compile_teachers: bool = False
    """Compile each block of the teachers."""

    def __post_init__(self) -> None:
        for name in ("alpha", "alpha_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--distillation.{name} {value} is not in [0, 1]")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"--distillation.temperature {self.temperature} must be positive")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"--distillation.top_k {self.top_k} must be at least 1")
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
        for name in ("teacher_precision", "teacher_device", "shard_teachers", "compile_teachers"):
            if self.cache is not None and getattr(self, name):
                raise ValueError(f"--distillation.{name} is for live teachers: with --distillation.cache leave it out")
        if self.cache is not None and self.divergence not in ("forward_kl", "topk_kl"):
            raise ValueError(
                f"--distillation.divergence {self.divergence} needs the teachers' whole distributions: a cache serves "
                "topk_kl, and forward_kl if it holds the whole vocabulary"
            )


@dataclass
class SaveArgs:
    """Checkpoints."""

    every_steps: int = 1000
    """Steps between checkpoints; there is always one at the last step."""
    state_dict_type: Literal["full", "sharded"] = "full"
    """`full`: one file. `sharded`: a folder to which every rank writes its part."""
    keep_last: int = 0
    """How many of the newest checkpoints to keep; 0: all."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for ever; 0: none is protected."""
    asynchronous: bool = False
    """Copy the state to host memory, and write it while training goes on; costs that memory."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do when a checkpoint cannot be written (a full disk): `stop` the run, or `skip` this one and say so."""

    def __post_init__(self) -> None:
        for name, least in (("every_steps", 1), ("keep_last", 0), ("keep_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--save.{name} {getattr(self, name)} must be at least {least}")


@dataclass
class EvalArgs:
    """Validation: at step 0, every so many steps, and at the last step."""

    every_steps: int = 1000
    """Steps between validations."""
    max_samples: int | None = None
    """Rows to validate on. Default: all of data.val."""
    micro_batch_samples: int | None = None
    """Rows at once. Default: train.micro_batch_samples."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "max_samples", "micro_batch_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--eval.{name} {value} must be at least 1")


TRACKERS = ("tensorboard", "wandb")


@dataclass
class LogArgs:
    """What is written while training."""

    every_steps: int = 10
    """Steps between rows of metrics.csv; each costs one wait for the device."""
    trackers: list[str] | str = field(default_factory=list)
    """Beside metrics.csv, which is always written: tensorboard, wandb, or both with a comma between them."""
    project: str = "llammlein"
    """Project at the tracker."""
    run_name: str | None = None
    """Name of the run at the tracker. Default: the name of out_dir."""
    layers: bool = False
    """Also write the norms of each layer's gradients, activations and updates at log steps, to layers.csv and the
    trackers. Costs the memory of a copy of the weights."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"--log.every_steps {self.every_steps} must be at least 1")
        if isinstance(self.trackers, str):
            self.trackers = [name for name in re.split(r"[\s,]+", self.trackers.strip("[] ")) if name]
        self.trackers = list(dict.fromkeys(self.trackers))
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(f"--log.trackers {name}: there is no such tracker; give {' or '.join(TRACKERS)}")


@dataclass
class GuardArgs:
    """What is watched while training."""

    max_skipped_steps: int = 100
    """Steps in a row that may be skipped for gradients that are not finite; the run ends after them."""
    spike_action: Literal["none", "warn", "rollback"] = "warn"
    """On a loss spike: nothing, a warning, or going back to the last checkpoint before it and leaving out the samples
    since then."""
    spike_sigmas: float = 6.0
    """A logged loss counts as high if it lies so many standard deviations above the mean of those before it."""
    spike_window: int = 64
    """Logged losses that the mean is taken of; half of them must be there."""
    spike_rows: int = 3
    """High losses in a row that are a spike."""
    max_rollbacks: int = 3
    """The run ends at the spike after so many rollbacks."""
    hang_timeout_s: int = 900
    """Seconds without progress after which every rank writes its stacks to its log and the run ends; 0: never."""

    def __post_init__(self) -> None:
        for name, least in (("max_skipped_steps", 1), ("spike_rows", 1), ("spike_window", 4)):
            if getattr(self, name) < least:
                raise ValueError(f"--guard.{name} {getattr(self, name)} must be at least {least}")
        for name in ("spike_sigmas", "max_rollbacks", "hang_timeout_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--guard.{name} {getattr(self, name)} must not be negative")


@dataclass
class StopArgs:
    """Stopping early: after SIGTERM, SIGUSR1 or Ctrl-C, or after a time, the run saves a checkpoint and ends."""

    after_minutes: float | None = None
    """Stop this many minutes after the process started, as SIGTERM does. For queues with a time limit: leave room for
    one step, one validation and one save."""
    exit_code: int = 0
    """Exit status of a run that was stopped and saved. After Ctrl-C it is 130."""
    requeue: bool = False
    """Call `scontrol requeue` for this SLURM job after saving, where the process can reach it (not from an image)."""

    def __post_init__(self) -> None:
        if not 0 <= self.exit_code <= 255:
            raise ValueError(f"--stop.exit_code {self.exit_code} must lie in 0 to 255")
        if self.after_minutes is not None and not self.after_minutes > 0:
            raise ValueError(f"--stop.after_minutes {self.after_minutes} must be greater than 0")


@dataclass
class RunArgs:
    """One pretraining run."""

    train: TrainArgs
    """How long and in which portions."""
    out_dir: Path | None = None
    """Folder of the run. Default: runs/NAME-DATE-TIME."""
    devices: int | Literal["auto"] = "auto"
    """Devices (processes) per node; auto: all GPUs, or 1 on a CPU."""
    num_nodes: int = 1
    """Nodes."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How devices share the work; auto: one device plainly, several by ddp."""
    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"] = "FULL_SHARD"
    """For fsdp: what is sharded. HYBRID_SHARD shards inside a node and replicates across; NO_SHARD is ddp."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the arithmetic; the weights that are updated are always fp32."""
    compile: bool = False
    """Compile each block with torch.compile."""
    resume: str | None = None
    """Go on with a run: latest, auto (latest or a fresh start), iter-XXXXXXXX-ckpt.pth in out_dir, or a path."""
    resume_allow: str | list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint's when resuming, for example train.max_steps,data."""
    preflight: bool = False
    """Check devices, network, disk, data, memory and one step with the real shapes, say what was found, and end."""
    init_from: Path | None = None
    """Begin with the weights of a checkpoint or a Hugging Face folder instead of a random initialisation."""
    init_optimizer: bool = False
    """Take AdamW's moments and its count of updates from init_from too. The data begin with their first row."""
    init_layers: list[int] | None = None
    """Which layers of init_from, by number from 0, the model begins with: a student of some of its teacher's layers."""
    objective: Literal["cross_entropy", "distillation"] = "cross_entropy"
    """What is minimised: the cross-entropy with the text, or that and the divergence from teachers."""
    seed: int = 1337
    """Of the initialisation, the order of the data and dropout."""
    timeout_s: int = 1800
    """Seconds after which a collective operation that a rank does not join is an error."""
    model: ModelArgs = field(default_factory=ModelArgs)
    """Which model."""
    data: DataArgs = field(default_factory=DataArgs)
    """What is read."""
    distillation: DistillationArgs = field(default_factory=DistillationArgs)
    """Teachers, and how much of them."""
    optim: OptimArgs = field(default_factory=OptimArgs)
    """AdamW and its schedule."""
    save: SaveArgs = field(default_factory=SaveArgs)
    """Checkpoints."""
    eval: EvalArgs = field(default_factory=EvalArgs)
    """Validation."""
    log: LogArgs = field(default_factory=LogArgs)
    """What is written while training."""
    guard: GuardArgs = field(default_factory=GuardArgs)
    """What is watched while training."""
    stop: StopArgs = field(default_factory=StopArgs)
    """What happens after a signal."""

    def __post_init__(self) -> None:
        if isinstance(self.resume_allow, str):
            self.resume_allow = [name.strip() for name in self.resume_allow.split(",") if name.strip()]
        d = self.distillation
        if (self.objective == "distillation") != (bool(d.teachers) or d.cache is not None):
            raise ValueError(
                f"--objective {self.objective}: --distillation.teachers (or --distillation.cache) go with --objective "
                "distillation, and only with it"
            )
        if d.cache is not None and self.data.train is None:
            raise ValueError("--distillation.cache is of one dataset: give --data.train")
        if d.shard_teachers and (self.strategy != "fsdp" or self.sharding_strategy == "NO_SHARD"):
            raise ValueError("--distillation.shard_teachers true is for --strategy fsdp that shards")
        if d.shard_teachers and d.teacher_device is not None:
            raise ValueError("--distillation.shard_teachers and teacher_device exclude each other")
        if self.init_layers is not None and (self.init_from is None or not self.init_layers):
            raise ValueError("--init_layers names layers of --init_from: give both")
        for flag in ("cpu_offload", "prefetch_blocks", "defer_gradient_sync"):
            if getattr(self.train, flag) and (self.strategy != "fsdp" or self.sharding_strategy == "NO_SHARD"):
                raise ValueError(f"--train.{flag} {getattr(self.train, flag)} is for --strategy fsdp that shards")
        if isinstance(self.devices, int) and self.devices < 1:
            raise ValueError(f"--devices {self.devices} must be at least 1")
        if self.num_nodes < 1:
            raise ValueError(f"--num_nodes {self.num_nodes} must be at least 1")
        if (self.data.train is not None) + bool(self.data.mixture) + bool(self.data.synthetic.tokens) != 1:
            raise ValueError(
                "give one of --data.train (a packed dataset), --data.mixture (several) and --data.synthetic.tokens "
                "(text to make)"
            )
        if self.data.mixture and self.train.max_epochs is not None:
            raise ValueError(
                f"--train.max_epochs {self.train.max_epochs}: the datasets of --data.mixture come to their ends at "
                "different times; give --train.max_steps or --train.max_tokens"
            )
        if self.data.synthetic.tokens and self.data.val is not None:
            raise ValueError(
                "--data.val does not go with --data.synthetic.tokens, which makes its own validation split"
            )
        if self.init_from is not None and self.model.name is not None:
            raise ValueError("--init_from brings the model's sizes with it: leave out --model.name")
        if self.init_optimizer and self.init_layers is not None:
            raise ValueError("--init_optimizer and --init_layers exclude each other: the state is that of all layers")
        if self.init_optimizer and self.init_from is None:
            raise ValueError("--init_optimizer true needs --init_from, the checkpoint to take the state from")
        if isinstance(self.devices, int) and self.devices > MAX_DEVICES:
            raise ValueError(f"--devices {self.devices}: at most {MAX_DEVICES} devices of a node are supported")
        if self.data.synthetic.tokens > MAX_SYNTHETIC:
            raise ValueError(
                f"--data.synthetic.tokens {self.data.synthetic.tokens}: at most {MAX_SYNTHETIC} are made; prepare a "
                "dataset with scripts/prepare_data.py"
            )
        for flag, seconds in (("timeout_s", self.timeout_s), ("guard.hang_timeout_s", self.guard.hang_timeout_s)):
            if seconds > MAX_SECONDS:
                raise ValueError(f"--{flag} {seconds}: at most {MAX_SECONDS} s are supported")
        for flag, value in flat(plain(self)).items():
            if flag != "seed" and isinstance(value, int) and abs(value) > MAX_NUMBER:
                raise ValueError(f"--{flag} {value}: at most 2^52 are supported")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed} must lie in [0, 2^63)")


def plain(value: Any) -> Any:
    """A dataclass as nested dictionaries of what YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"max_steps": 3}} -> {"train.max_steps": 3}."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out
