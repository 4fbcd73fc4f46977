"""Opens a run's packed datasets, checks them against the model and the settings, and makes their loaders."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from lit_data.loading.loader import Loader, RankLayout
from lit_data.loading.mixture import Mixture, phase_list
from lit_data.loading.order import Order, Segment, first_sample_of_step
from lit_data.loading.rows import Rows, count_windows, open_rows
from lit_data.loading.shard_cache import ShardCache
from lit_data.packed.reader import PackedDataset
from lit_data.record.recorded_loader import RecordedLoader
from lit_eval.model.model_tokenizer import OVERRIDE, check_model_and_data, compare, of_data
from lit_eval.model.text_encoding import check_bos, unlike_special_tokens, unlike_start
from lit_files.platform import memory_bytes
from lit_model.config import ModelConfig
from lit_model.hf.families import family_of
from pretrain.args import AUTO, MAX_MICRO_BATCH_TOKENS, RunArgs, TrainArgs
from pretrain.distillation.teacher_cache import CachedTeacher, check_cache
from pretrain.distillation.teachers import Teachers, check_teachers
from pretrain.fabric import Fabric
from pretrain.failure.peers import on_rank_zero
from pretrain.init_from import model_config
from pretrain.launch import is_rank

MAX_SAMPLES = 1 << 60  # of a run: their numbers are 64-bit integers
LOAD_BALANCE_LOSS = 0.001  # the default weight, that of Llama 4 in transformers (router_aux_loss_coef)


@dataclass(frozen=True)
class Data:
    """The data in the order of training. `rows`: of each dataset of the mixture; `val`: of each validation set."""

    rows: list[Rows]
    val: dict[str, Rows]
    mixture: Mixture
    block_size: int
    max_steps: int
    end_sample: int | None

    @property
    def train(self) -> list[PackedDataset]:
        return [r.dataset for r in self.rows]

    def epochs(self, samples: int) -> list[float]:
        """Passes over each dataset in the first `samples` samples, as averages over its rows."""
        if self.end_sample is not None:
            samples = min(samples, self.end_sample)  # the last step is filled up with empty rows
        counts = self.mixture.counts(samples).tolist()
        return [count / r.n_windows for count, r in zip(counts, self.rows, strict=True)]


@dataclass(frozen=True)
class Datasets:
    """The packed datasets, checked against the model and each other. `val`: by name, see `val_sets`."""

    train: list[PackedDataset]
    val: dict[str, PackedDataset]
    block_size: int
    notes: list[str] = dataclasses.field(default_factory=list)
    """Checks that could not be made."""


def open_before_launch(args: RunArgs, kind: str) -> tuple[Datasets, ModelConfig] | None:
    """The data, if it exists and this is the only process so far: mistakes in it are reported before others start.

    None on a rank of several, for synthetic data, and for a resume, which must find its checkpoint first.
    """
    if args.resume is not None:
        return None
    if args.data.synthetic.tokens:
        config = model_config(args, args.data.synthetic.vocab_size)
        check_memory(args, kind, config, args.train.block_size or config.block_size)
        return None
    return None if is_rank() else open_datasets(args, kind)


def open_datasets(args: RunArgs, kind: str | None, checkpoint: Path | None = None) -> tuple[Datasets, ModelConfig]:
    """Open the datasets, and check them against the model and the settings.

    Args:
        kind: of the devices; None: unknown, and the memory is not checked.
        checkpoint: the one to resume.

    Raises ValueError or FileNotFoundError.
    """
    if args.data.train is not None:
        train = [PackedDataset(args.data.train)]
    else:
        train = [PackedDataset(entry.path) for entry in args.data.mixture]
    named = [("--data.train" if args.data.train is not None else "--data.mixture", dataset) for dataset in train]
    val = {name: PackedDataset(path) for name, path in val_sets(args.data.val).items()}
    named += [(f"--data.val {name}".rstrip(), dataset) for name, dataset in val.items()]
    if args.save.at_words or args.eval.tasks_every_words:
        check_counted(train, "--save.at_words" if args.save.at_words else "--eval.tasks_every_words")
    config = model_config(args, train[0].vocab_size, checkpoint)
    router_losses(args.train, config)  # raises if they do not fit
    if args.save.hf:
        try:
            family_of(config)
        except ValueError as error:
            raise ValueError(f"--save.hf true: {error}") from None
    block_size = args.train.block_size or config.block_size
    check_memory(args, kind, config, block_size)
    for flag, dataset in named:
        if dataset.vocab_size > config.vocab_size:
            raise ValueError(
                f"{flag} {dataset.path} was tokenized with {dataset.vocab_size} ids, but the model has a vocabulary of "
                f"{config.vocab_size}: leave --model.vocab_size out, or prepare the data with the model's tokenizer"
            )
        same = compare(of_data(train[0]), of_data(dataset)) == "same"
        if not same and not args.data.allow_tokenizer_mismatch:
            raise ValueError(
                f"{flag} {dataset.path} was made with another tokenizer than {named[0][0]} {train[0].path}: prepare "
                f"both with the same, or override with {OVERRIDE}"
            )
        if not flag.startswith("--data.val") and dataset.n_tokens < block_size:
            raise ValueError(
                f"{flag} {dataset.path} has {dataset.n_tokens} tokens, less than one row of {block_size}: use more "
                "text or a smaller --train.block_size"
            )
    check_bos(named)
    notes = []
    if args.init_from is not None and checkpoint is None and not args.data.allow_tokenizer_mismatch:
        unknown = check_model_and_data(args.init_from, train[0], f"--init_from {args.init_from}")
        unlike = unlike_start(args.init_from, train[0])
        notes += [note for note in (unknown, unlike) if note is not None]
    check_teachers(args, config, train[0], block_size)
    if args.distillation.cache is not None:
        facts = (train[0], args.data.packing, block_size, args.data.document_mask, config.vocab_size)
        check_cache(args.distillation, *facts)
    weights_of(args)
    # Otherwise the number of rows needs a plan, and the length is checked once there is one.
    if args.train.max_epochs is None or args.data.packing == "concat":
        length_of(args, block_size, count_windows(train[0].n_tokens, block_size), first_segments(args))
    return Datasets(train, val, block_size, notes), config


def val_sets(val: dict[str, Path] | Path | None) -> dict[str, Path]:
    """The folders of --data.val by name; a single unnamed one has the name ""."""
    if val is None:
        return {}
    return {"": val} if isinstance(val, Path) else {str(name): path for name, path in val.items()}


def check_counted(datasets: list[PackedDataset], flag: str) -> None:
    """Refuse a flag that counts words for data whose words are not counted, naming the command that counts them."""
    try:
        for dataset in datasets:
            _ = dataset.n_words
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error


def check_memory(args: RunArgs, kind: str | None, config: ModelConfig, block_size: int) -> None:
    """Refuse sizes that no device has room for. Raises ValueError that names them."""
    train_rows = 1 if args.train.micro_batch_samples == AUTO else args.train.micro_batch
    for rows in (train_rows, args.eval.micro_batch_samples or 1):
        if rows * block_size > MAX_MICRO_BATCH_TOKENS:
            raise ValueError(
                f"a micro-batch of {rows} rows of {block_size} tokens is more than the {MAX_MICRO_BATCH_TOKENS} that "
                "are supported: give a smaller --train.micro_batch_samples, --eval.micro_batch_samples or "
                "--train.block_size"
            )
    if kind == "cpu":
        weights = 4 * config.least_parameters // args.num_nodes
        if weights > (memory := memory_bytes()):
            raise ValueError(
                f"the model's weights alone take {weights / 1e9:,.0f} GB on a node, which has {memory / 1e9:,.0f} GB: "
                "give a smaller model (--model.name, --model.n_layer, --model.n_embd)"
            )


def router_losses(args: TrainArgs, config: ModelConfig) -> dict[str, float]:
    """The weights of the routers' losses. Raises ValueError for one of a model without experts."""
    given = {"load_balance_loss": args.load_balance_loss, "router_z_loss": args.router_z_loss}
    for name, value in given.items():
        if value and not config.n_expert:
            raise ValueError(f"--train.{name} {value} is for a model with experts (--model.n_expert): leave it out")
    default = {"load_balance_loss": LOAD_BALANCE_LOSS if config.n_expert else 0.0, "router_z_loss": 0.0}
    return {name: default[name] if value is None else value for name, value in given.items()}


def first_segments(args: RunArgs) -> list[Segment]:
    """Of a run from its beginning."""
    return [Segment(0, 0, args.train.global_batch_samples)]


def length_of(args: RunArgs, block_size: int, n_windows: int, segments: list[Segment]) -> tuple[int, int | None]:
    """The number of steps, and the end of the samples (None: the last step is full)."""
    t, last = args.train, segments[-1]
    end_sample = None
    if t.max_steps is not None:
        max_steps = t.max_steps
    elif t.max_tokens is not None:
        used = sum((b.from_step - a.from_step) * a.global_batch for a, b in pairwise(segments))
        rows = -(-t.max_tokens // block_size)
        max_steps = last.from_step + max(0, -(-(rows - used) // last.global_batch))
    else:
        assert t.max_epochs is not None
        end_sample = max(1, round(n_windows * t.max_epochs))
        max_steps = last.from_step + max(0, -(-(end_sample - last.first_sample) // last.global_batch))
    if max_steps * last.global_batch > MAX_SAMPLES:
        raise ValueError(
            f"the run would have {max_steps} steps of {last.global_batch} rows: at most 2^60 rows are supported; give "
            "a smaller --train.max_steps (or max_tokens, max_epochs)"
        )
    optim = args.optim.resolved(max_steps)
    total, warmup, decay = max_steps + optim.steps_before, optim.warmup_steps, optim.decay_steps
    if warmup > total:
        raise ValueError(
            f"--optim.warmup_steps {warmup} exceeds the run's {max_steps} steps: give a smaller one, such as "
            f"--optim.warmup_steps {max_steps // 10}"
        )
    if warmup + decay > total:
        raise ValueError(
            f"--optim.decay_steps {decay} exceeds the {max(0, total - warmup)} steps of the run after the warmup"
        )
    return max_steps, end_sample


def weights_of(args: RunArgs) -> list[tuple[int, list[float]]]:
    """(first step, weights) of each phase. Raises ValueError for weights without integer quotas."""
    if args.data.train is not None:
        return [(0, [1.0])]
    weights = [(0, [entry.weight for entry in args.data.mixture])]
    weights += [(phase.from_step, phase.weights) for phase in args.data.phases]
    for step, some in weights:
        try:
            phase_list([(0, some)])
        except ValueError as error:
            flag = f"--data.phases from step {step}" if step else "--data.mixture"
            raise ValueError(f"{flag}: {error}") from error
    return weights


def open_data(args: RunArgs, fabric: Fabric, datasets: Datasets, segments: list[Segment]) -> Data:
    """The rows of the datasets, their order, and the length of the run. Rank 0 makes missing row plans."""

    def rows_of(dataset: PackedDataset) -> Rows:
        return open_rows(dataset, args.data.packing, datasets.block_size, args.data.plan_dir)

    def make_plans() -> None:
        for dataset in [*datasets.train, *datasets.val.values()]:
            rows_of(dataset)

    if (line := unlike_special_tokens([*datasets.train, *datasets.val.values()])) is not None:
        fabric.print(f"warning: {line}")
    on_rank_zero(fabric, make_plans)
    rows = [rows_of(dataset) for dataset in datasets.train]
    n_rows = sum(r.n_windows for r in rows)
    if n_rows < args.train.global_batch_samples:
        fabric.print(
            f"warning: the data has {n_rows} rows of {datasets.block_size} tokens, fewer than the "
            f"{args.train.global_batch_samples} of a step (--train.global_batch_samples): rows repeat within a step"
        )
    val_rows = {name: rows_of(dataset) for name, dataset in datasets.val.items()}
    return in_order(args, rows, val_rows, datasets.block_size, segments)


def in_order(args: RunArgs, rows: list[Rows], val: dict[str, Rows], block_size: int, segments: list[Segment]) -> Data:
    """The rows of each dataset with the order of training and the length of the run."""
    max_steps, end_sample = length_of(args, block_size, rows[0].n_windows, segments)
    block, group = args.data.shuffle_block_rows, args.data.shuffle_group_blocks
    orders = (Order(r.n_windows, args.seed, d, block_windows=block, group_blocks=group) for d, r in enumerate(rows))
    phases = phase_list([(first_sample_of_step(segments, step)[0], w) for step, w in weights_of(args)])
    return Data(rows, val, Mixture(tuple(orders), phases, args.seed), block_size, max_steps, end_sample)


def training_loader(
    args: RunArgs,
    fabric: Fabric,
    data: Data,
    segments: list[Segment],
    teachers: Teachers | CachedTeacher | None = None,
    record: Path | None = None,
) -> Loader:
    """The loader of this rank's rows, and of the cached predictions of its teachers.

    Args:
        record: the run folder whose record gives the rows of each step. None: the order of the data does.
    """
    micro_batch = args.train.micro_batch
    load = Loader if record is None else partial(RecordedLoader, record)
    return load(
        data.rows,
        data.mixture,
        RankLayout(data.block_size, micro_batch, fabric.global_rank, fabric.world_size, args.data.document_mask),
        segments,
        end_sample=data.end_sample,
        prefetch_steps=args.data.prefetch_steps,
        pin_memory=fabric.device.type == "cuda",
        caches=open_caches(args, data),
        mock=args.data.mock,
        read_extra=teachers.read if isinstance(teachers, CachedTeacher) else None,
    )


def validation_loader(args: RunArgs, fabric: Fabric, data: Data, rows: Rows) -> Loader:
    """The loader of a validation set in its order, dealt out to the ranks; the last rows may be empty."""
    micro_batch = args.eval.micro_batch_samples or args.train.micro_batch
    n_windows = rows.n_windows
    return Loader(
        [rows],
        Mixture.single(Order(n_windows, shuffle=False)),
        RankLayout(data.block_size, micro_batch, fabric.global_rank, fabric.world_size, args.data.document_mask),
        [Segment(0, 0, micro_batch * fabric.world_size)],
        end_sample=min(n_windows, args.eval.max_samples or n_windows),
        pin_memory=fabric.device.type == "cuda",
    )


def open_caches(args: RunArgs, data: Data) -> list[ShardCache] | None:
    """A cache before each dataset, in one folder with one budget; None without --data.cache_dir."""
    if args.data.cache_dir is None:
        return None
    budget, chunks = int(args.data.cache_gb * 1e9), []
    for dataset in data.train:
        # A block that spans several chunks is read without much of its neighbours.
        block_bytes = args.data.shuffle_block_rows * data.block_size * dataset.dtype.itemsize
        chunks.append(min(16 << 20, max(1 << 20, block_bytes // 4)) if block_bytes else 16 << 20)
    folder = args.data.cache_dir
    return [ShardCache(d, folder, budget, chunk_bytes=c) for d, c in zip(data.train, chunks, strict=True)]
