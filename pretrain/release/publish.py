"""Publishes a run's checkpoints as the revisions of a release, oldest first, to a folder or a hub.

A revision is complete before it gets its name, and each manifest names the one before it. An interrupted call can
therefore be repeated: it continues after the last published revision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from lit_data.record.content import scan_record
from lit_data.record.parts import covered_until
from lit_eval.run_facts import find_results, is_run
from lit_files.checkpoint_name import list_checkpoints
from lit_files.lock import LockBusy, lock_folder
from lit_files.nested_run import did_you_mean_run
from lit_files.progress import track
from lit_files.run_files import DATAPOINTS
from lit_model.load import MODEL_PREFIX, Checkpoint
from pretrain.release.card import stated_options
from pretrain.release.manifest import Link, counted
from pretrain.release.revision import Card, Planned, read_planned, write_revision

TrainingState = Literal["all", "last", "none"]
NO_LICENCE = (
    "warning: the model card states no licence; give one now, such as --license apache-2.0: "
    "a published revision is never changed"
)
REMEDY = "a published revision is never changed: leave the option out, or publish to a new place"


class Release(Protocol):
    """Destination of published revisions: a folder or a hub."""

    def chain(self) -> list[Link]: ...

    def card(self, link: Link) -> str: ...

    def earlier_record(self, before: Link | None) -> Path | None: ...

    def new_revision(self, name: str) -> AbstractContextManager[Path]: ...

    def update_names(self, chain: list[Link]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class PublishArgs:
    """How a run is published.

    Attributes:
        repo: NAMESPACE/NAME on a hub, also named in the card.
        licence: of the weights, for the card's front matter.
        training_state: the checkpoints published with the optimizer's state; None: all.

    With earlier revisions, None stands for the repository and the licence that their cards state.
    """

    repo: str | None = None
    licence: str | None = None
    training_state: TrainingState | None = None


@contextmanager
def hold_run(run: Path) -> Iterator[None]:
    """Lock a run folder. Raises ValueError if it is not one, or the run is still training."""
    if not run.is_dir() or not is_run(run):
        raise ValueError(f"{run} is not a run folder: give the --out_dir of a training run{did_you_mean_run(run)}")
    try:
        lock = lock_folder(run, "publish it when it has ended, or stop it first")
    except LockBusy as error:
        raise ValueError(f"the run is still training: {error}") from error
    try:
        yield
    finally:
        lock.close()


def plan(run: Path, training_state: TrainingState | None) -> list[Planned]:
    """A run's checkpoints as revisions, oldest first.

    Raises ValueError for a run without checkpoints, a checkpoint that training did not write, and a record that does
    not cover all steps.
    """
    paths = list_checkpoints(run)
    if not paths:
        raise ValueError(f"{run} holds no checkpoint to publish")
    keep = {"all": set(paths), "last": {paths[-1]}, "none": set()}[training_state or "all"]
    planned = [read_planned(path, path in keep) for path in paths]
    names = [name for some in planned for name in (some.name, *some.aliases)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{run}: two checkpoints would be published as {twice[0]}")
    if not (run / DATAPOINTS).is_dir():
        raise ValueError(
            f"{run} has no datapoint record (it ran with --data.datapoints false, or on mock data), and without it no "
            "revision can be checked or re-executed; convert_to_hf.py exports a single checkpoint"
        )
    at = covered_until(run, 0)
    if lacking := [some for some in planned if some.step > at]:
        raise ValueError(
            f"{lacking[0].checkpoint} has no record: {run / 'datapoints'} ends at step {at}; "
            f"see trace_data.py verify {run}"
        )
    return planned


def remaining(planned: list[Planned], chain: list[Link], run: Path, where: object) -> list[Planned]:
    """The revisions still to publish. Raises ValueError if the published ones are from another run."""
    if not chain:
        return planned
    last = chain[-1].manifest
    new = [some for some in planned if some.step > last.step]
    known = {link.manifest.step: link.manifest.revision for link in chain}
    for some in planned:
        if some.step in known and known[some.step] != some.name:
            raise ValueError(
                f"{where} holds step {some.step} as {known[some.step]}, not {some.name}: another run's release"
            )
    part = last.record[-1]
    at = max(some.step for some in planned)
    if at < part.end_step or scan_record(run, part.first_step, part.end_step).content != part:
        raise ValueError(
            f"{where} holds the release of another run than {run}: its record of steps {part.first_step} to "
            f"{part.end_step - 1} differs"
        )
    return new


def settle(release: Release, chain: list[Link], planned: list[Planned], args: PublishArgs) -> PublishArgs:
    """The arguments, with what the published revisions state where none was given.

    Raises ValueError for one that contradicts them: a published revision is never changed.
    """
    if not chain:
        return args
    last = chain[-1].manifest.revision
    stated = stated_options(release.card(chain[-1]), f"{release}: the card of {last}")
    for flag, given in {"license": args.licence, "repo": args.repo}.items():
        if given not in (None, stated[flag], str(release)):  # a hub's repository is the release
            was = f"--{flag} {stated[flag]}" if stated[flag] is not None else f"no --{flag}"
            raise ValueError(f"--{flag} {given}: {release} was published with {was}; {REMEDY}")
    published = {link.manifest.step: link.manifest.training_state for link in chain}
    for some in planned if args.training_state is not None else ():
        has = published.get(some.step, some.training_state)
        if has != some.training_state and not (has and args.training_state == "last"):  # it may have been the last
            state = "with" if has else "without"
            raise ValueError(
                f"--training_state {args.training_state}: {release} was published {state} the training state of "
                f"{some.name}; {REMEDY}"
            )
    return replace(args, licence=stated["license"], repo=args.repo or stated["repo"])


def publish(run: Path, release: Release, args: PublishArgs, say: Callable[[str], None] = print) -> list[Link]:
    """Publish a run's checkpoints that are not published yet. Returns the whole chain.

    Raises ValueError, before anything is written, for bad input.
    """
    with hold_run(run):
        planned = plan(run, args.training_state)
        try:
            chain = release.chain()
            new = remaining(planned, chain, run, release)
            known = {link.manifest.step for link in chain}
            if left_out := [some.name for some in planned if some not in new and some.step not in known]:
                say(f"warning: later revisions are published already; these are left out: {', '.join(left_out)}")
            release.update_names(chain)
            args = settle(release, chain, planned, args)
            if new and args.licence is None:
                say(NO_LICENCE)
            card = Card(args.repo, args.licence, find_results(run)[0])
            for some in track(new, "publishing", "revisions"):
                before = chain[-1] if chain else None
                with release.new_revision(some.name) as folder:
                    link = write_revision(run, some, before, folder, card, earlier=release.earlier_record(before))
                chain.append(link)
                release.update_names(chain)
                say(f"{release}: {some.name}, manifest {link.sha256}")
            return chain
        finally:
            release.close()


def describe_plan(run: Path, args: PublishArgs) -> Iterator[str]:
    """The dry run: one line per revision that publishing would write, and the total size."""
    with hold_run(run):
        planned = plan(run, args.training_state)
        total = 0
        for some in planned:
            checkpoint = Checkpoint(some.checkpoint)
            layouts = {name: checkpoint.layout(name).nbytes for name in checkpoint.names()}
            weights = sum(n for name, n in layouts.items() if name.startswith(MODEL_PREFIX))
            state = sum(layouts.values()) if some.training_state else 0
            total += weights + state
            tokens = some.meta.get("tokens")
            seen = f"{tokens:,} tokens" if tokens is not None else "tokens unknown"
            with_state = f" and training state of {state / 1e6:,.1f} MB" if state else ""
            names = ", ".join([some.name, *some.aliases])
            yield f"{names}: step {some.step:,}, {seen}; weights of {weights / 1e6:,.1f} MB{with_state}"
        if args.licence is None:
            yield NO_LICENCE
        count = counted(len(planned), "revision")
        yield f"{count}, {total / 1e6:,.1f} MB of weights and training state, besides the record"
