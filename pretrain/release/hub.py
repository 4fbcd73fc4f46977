"""A release on a hub that speaks Hugging Face's protocol: a commit of `main` for each revision, and tags for its names.

A revision's files are uploaded first and become visible in one commit, which is then tagged. The hub keeps uploaded
large files by their SHA-256 even without a commit, so that only files whose upload was interrupted are sent again.
Credentials come from huggingface_hub's own login or its environment variables.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lit_files.publish import build_folder, link_or_copy
from lit_files.reading import MAX_TEXT_BYTES, first_line, read_bytes
from lit_files.run_files import DATAPOINTS
from pretrain.release.manifest import ADDED, MAIN, MANIFEST, RUN, File, Link, in_chain, parse_link, read_link, sha256_of
from pretrain.release.verify import Opened, Revision, size_difference

T = TypeVar("T")

TRIES = 8  # of a request that fails because of the network, a rate limit or the server
MOST_WAIT_S = 300.0


class Hub:
    """One repository on a hub, with readable errors and retries.

    Args:
        flag: the flag that named the repository, for errors.
    """

    def __init__(self, repo: str, flag: str = "--repo") -> None:
        try:
            from huggingface_hub import HfApi, constants
            from huggingface_hub.utils import validate_repo_id
        except ImportError as error:
            raise ValueError("this needs the package huggingface-hub: pip install 'llammlein[hub]'") from error
        self.repo, self.flag = repo, flag
        self.endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        self.api = HfApi(endpoint=self.endpoint, library_name="llammlein")
        self._reached = False
        try:
            validate_repo_id(repo)
        except ValueError as error:
            raise ValueError(f"{flag} {repo}: {error}") from error
        if repo.count("/") != 1:
            raise ValueError(f"{flag} {repo}: give NAMESPACE/NAME")

    def call(self, work: Callable[[], T]) -> T:
        """Send a request; retry it after network errors, rate limits and server errors.

        Raises ValueError with advice for other errors, FileNotFoundError for a repository that does not exist.
        """
        for attempt in range(TRIES):
            try:
                result = work()
            except Exception as error:
                wait_s = self._wait_s(error, attempt)
                if wait_s is None or attempt == TRIES - 1:
                    self._refuse(error)
                print(f"{self.endpoint}: {first_line(_cause(error))}; waiting {wait_s:.0f} s")
                time.sleep(wait_s)
            else:
                self._reached = True
                return result
        raise AssertionError

    def _wait_s(self, error: Exception, attempt: int) -> float | None:
        """Seconds to wait before the next try; None if a retry is pointless."""
        cause = _cause(error)
        wait_s = min(2.0**attempt, 60.0) * (0.5 + random.random() / 2)
        response = getattr(cause, "response", None)
        if response is None:  # no answer; to the first request, because of a wrong address or no network
            return wait_s if self._reached and _is_network(cause) else None
        if response.status_code == 429:
            return min(MOST_WAIT_S, max(wait_s, _seconds_to_reset(response.headers)))
        return wait_s if response.status_code >= 500 else None

    def _refuse(self, error: Exception) -> NoReturn:
        from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

        cause = _cause(error)
        status = getattr(getattr(cause, "response", None), "status_code", None)
        access = "write" if self.flag == "--repo" else "read"
        advice = f"log in with `hf auth login`, or set HF_TOKEN to a token with {access} access to the repository"
        named = f"{self.flag} {self.repo}"
        if isinstance(cause, OfflineModeIsEnabled):
            raise ValueError(f"{named}: HF_HUB_OFFLINE is set; unset it to reach a hub") from error
        if isinstance(cause, RepositoryNotFoundError):
            raise FileNotFoundError(f"{named} is not on {self.endpoint}, or is private: {advice}") from error
        if status in (401, 403):
            raise ValueError(f"{named}: {self.endpoint} denies access (HTTP {status}): {advice}") from error
        if status is not None:
            raise ValueError(f"{named}: {self.endpoint}: {first_line(cause)}; run the command again") from error
        if _is_network(cause):
            raise ValueError(
                f"{named}: {self.endpoint} cannot be reached ({first_line(cause)}); run the command again"
            ) from error
        raise error

    def refs(self) -> tuple[dict[str, str], dict[str, str]]:
        """The commits of the branches and of the tags, by name."""
        refs = self.call(lambda: self.api.list_repo_refs(self.repo))
        return {r.name: r.target_commit for r in refs.branches}, {r.name: r.target_commit for r in refs.tags}

    def files(self, commit: str) -> dict[str, Any]:
        """The files of a commit, by path, with size and the hub's hashes (RepoFile)."""
        entries = self.call(lambda: list(self.api.list_repo_tree(self.repo, recursive=True, revision=commit)))
        return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}

    def read(self, commit: str, path: str) -> bytes:
        """A small file's content, not from a cache.

        Raises FileNotFoundError if the commit does not have it, ValueError if it has more than MAX_TEXT_BYTES.
        """
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        def download(folder: str) -> bytes | None:
            place: dict[str, Any] = {"revision": commit, "cache_dir": folder}
            try:
                size = self.api.hf_hub_download(self.repo, path, dry_run=True, **place).file_size or 0
                if size > MAX_TEXT_BYTES:
                    raise ValueError(f"{self.repo}: {path} has {size} bytes; at most {MAX_TEXT_BYTES} are read")
                return read_bytes(self.api.hf_hub_download(self.repo, path, **place))
            except LocalEntryNotFoundError as error:  # an outage, although it is an EntryNotFoundError too
                raise (error.__cause__ or error) from None
            except EntryNotFoundError:
                return None

        with tempfile.TemporaryDirectory() as folder:
            content = self.call(lambda: download(folder))
        if content is None:
            raise FileNotFoundError(f"{self.repo} has no {path} at {commit}")
        return content

    def link(self, commit: str) -> Link | None:
        """The manifest at a commit; None if it has none. Raises ValueError for a damaged one."""
        try:
            content = self.read(commit, MANIFEST)
        except FileNotFoundError:
            return None
        return parse_link(content, f"{self.repo}: {MANIFEST}")


def _cause(error: BaseException) -> BaseException:
    """The HTTP or network error behind an error: huggingface_hub raises RuntimeError from those of upload threads."""
    from huggingface_hub.errors import HfHubHTTPError

    beneath: BaseException | None = error
    while beneath is not None:
        if isinstance(beneath, HfHubHTTPError) or _is_network(beneath):
            return beneath
        beneath = beneath.__cause__
    return error


def _is_network(error: BaseException) -> bool:
    """Whether no answer came. huggingface_hub uses httpx up to 1.x, httpx2 from 2.0 on."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, RuntimeError) and "client has been closed" in str(error):
        return True  # after a network error of one upload thread, another may find the connection closed
    client_error = HfHubHTTPError.__bases__[0]
    return isinstance(error, (client_error, ConnectionError)) and not isinstance(error, HfHubHTTPError)


def _seconds_to_reset(headers: Any) -> float:
    """Seconds until a rate limit ends, by Retry-After or the draft header RateLimit; 0 if neither says."""
    from huggingface_hub.utils import parse_ratelimit_headers

    after = headers.get("Retry-After", "")
    limit = parse_ratelimit_headers(headers)
    return max(float(after) if after.isdigit() else 0.0, float(limit.reset_in_seconds + 1) if limit else 0.0)


def is_same(entry: Any, expected: File) -> bool | None:
    """Whether a hub's file is the one in a manifest, by size and hash; None if the hub has no hash that tells."""
    if entry.size != expected.bytes:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == expected.sha256)
    return None if expected.git_blob is None else bool(entry.blob_id == expected.git_blob)


class HubRelease:
    """Publishes revisions to a repository, which is created if it is missing.

    Args:
        staging: folder for the revision being uploaded, on the run's file system; removed before and after.
        public: create a public repository; an existing private one is refused.
    """

    def __init__(self, hub: Hub, staging: Path, *, public: bool = False) -> None:
        self.hub, self.staging, self.public = hub, staging, public
        self._commits: dict[str, str] = {}  # of the manifests by their SHA-256
        self._tags: dict[str, str] = {}

    def __str__(self) -> str:
        return self.hub.repo

    def chain(self) -> list[Link]:
        """The published revisions, oldest first. Raises ValueError for a broken chain, and for other content."""
        if self.staging.exists():  # of a killed call: the run may have been rewound and trained again since
            shutil.rmtree(self.staging)
        try:
            branches, self._tags = self.hub.refs()
        except FileNotFoundError:
            return []
        if self.public and self.hub.call(lambda: self.hub.api.repo_info(self.hub.repo)).private:
            raise ValueError(f"--public: {self} exists and is private; make it public in its settings on the hub")
        links: dict[str, Link] = {}
        main = {MAIN: branches[MAIN]} if MAIN in branches else {}
        names = {commit: name for name, commit in (main | self._tags).items()}
        for commit, name in names.items():
            link = self.hub.link(commit)
            if link is not None:
                links[link.sha256] = link
                if self._tags.get(link.manifest.revision) == commit or link.sha256 not in self._commits:
                    self._commits[link.sha256] = commit
                continue
            other = sorted(self.hub.files(commit).keys() - set(ADDED))
            if name != MAIN or other:
                what = f"{other[0]} at {name}" if other else f"the tag {name}"
                raise ValueError(f"--repo {self} exists with other content ({what}): give a new name")
        return in_chain(links.values(), self)

    def update_names(self, chain: list[Link]) -> None:
        """Create the repository if it does not exist, and the tags of the revisions in the chain.

        Raises ValueError for a tag at another commit.
        """
        if not chain:
            self.hub.call(self._create)
        names = {
            name: self._commits[link.sha256]
            for link in chain
            for name in (link.manifest.revision, *link.manifest.aliases)
        }
        if missing := names.keys() - self._tags.keys():
            for name in sorted(missing):
                self.hub.call(functools.partial(self._tag, name, names[name]))
            self._tags = self.hub.refs()[1]  # an answer may be lost, and a tag of that name created meanwhile
        for name, commit in names.items():
            if (found := self._tags.get(name, commit)) != commit:
                raise ValueError(
                    f"--repo {self}: the tag {name} is at commit {found}, its revision at {commit}: delete the tag"
                )

    def card(self, link: Link) -> str:
        """The model card of a published revision."""
        return self.hub.read(self._commits[link.sha256], "README.md").decode(errors="replace")

    def _create(self) -> None:
        self.hub.api.create_repo(self.hub.repo, private=not self.public, exist_ok=True)

    def _tag(self, name: str, commit: str) -> None:
        self.hub.api.create_tag(self.hub.repo, tag=name, revision=commit, exist_ok=True)

    def earlier_record(self, before: Link | None) -> Path | None:
        """Files of the record from revisions that this call uploaded."""
        folder = self.staging / DATAPOINTS
        return folder if folder.is_dir() else None

    @contextmanager
    def new_revision(self, name: str) -> Iterator[Path]:
        """Yield an empty folder for a revision's files; upload and remove it if the block ends without an exception."""
        self.staging.mkdir(exist_ok=True)
        folder = self.staging / name
        with build_folder(folder, replace=True) as temporary:
            yield temporary
        self._upload(folder)
        kept = self.staging / DATAPOINTS
        kept.mkdir(exist_ok=True)
        for path in (folder / RUN / DATAPOINTS).glob("steps-*.parquet"):
            if not (kept / path.name).exists():
                link_or_copy(path, kept / path.name)
        shutil.rmtree(folder)

    def close(self) -> None:
        """Remove the staging folder."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def _upload(self, folder: Path) -> None:
        """Upload a revision's files and commit them onto `main`.

        Raises ValueError if `main` is no longer at the revision before it.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        link = read_link(folder)
        head = self.hub.refs()[0][MAIN]
        before = self.hub.link(head)
        if (before and before.previous) != link.manifest.previous:
            raise self._changed(link)
        present = self.hub.files(head)
        changed = [p for p, file in link.manifest.files.items() if p not in present or not is_same(present[p], file)]
        added = [CommitOperationAdd(path, str(folder / path)) for path in [*changed, MANIFEST]]
        gone = sorted(present.keys() - link.manifest.files.keys() - {MANIFEST} - set(ADDED))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            self.hub.call(lambda: self.hub.api.preupload_lfs_files(self.hub.repo, added, free_memory=False))
            operations = [*added, *(CommitOperationDelete(path) for path in gone)]
            commit = self.hub.call(lambda: self._commit(link, operations, head))
        self._commits[link.sha256] = commit

    def _commit(self, link: Link, operations: list[Any], head: str) -> str:
        """Commit onto `head`. If an earlier try succeeded and its answer was lost, returns that commit."""
        now = self.hub.refs()[0][MAIN]
        if now != head:
            there = self.hub.link(now)
            if there is None or there.sha256 != link.sha256:
                raise self._changed(link)
            return now
        message = f"{link.manifest.revision}: step {link.manifest.step}"
        done = self.hub.api.create_commit(
            self.hub.repo, operations, commit_message=message, revision=MAIN, parent_commit=head
        )
        return str(done.oid)

    def _changed(self, link: Link) -> ValueError:
        name = link.manifest.revision
        return ValueError(
            f"--repo {self}: somebody else changed {MAIN} before {name} was committed; run publish.py again"
        )


@dataclass(frozen=True)
class HubRevision:
    """A commit. With `download` its files are downloaded so that their content can be checked."""

    name: str
    hub: Hub
    commit: str
    download: bool

    @functools.cached_property
    def _files(self) -> dict[str, Any]:
        return self.hub.files(self.commit)

    def paths(self) -> set[str]:
        return self._files.keys() - set(ADDED) - {MANIFEST}

    def difference(self, path: str, expected: File) -> str | None:
        if (text := size_difference(self._files[path].size, expected)) is not None:
            return text
        same = is_same(self._files[path], expected)
        if same is None:
            same = sha256_of(self.hub.read(self.commit, path)) == expected.sha256
        return None if same else "its hash differs from the manifest's"

    def read(self, path: str) -> bytes:
        return self.hub.read(self.commit, path)

    @contextmanager
    def content(self) -> Iterator[Path | None]:
        if not self.download:
            yield None
            return
        with tempfile.TemporaryDirectory() as folder:
            self.hub.call(lambda: self.hub.api.snapshot_download(self.hub.repo, revision=self.commit, local_dir=folder))
            yield Path(folder)


def open_hub(hub: Hub, *, download: bool = False) -> Opened:
    """Open a release on a hub, its tags and branches. Raises FileNotFoundError or ValueError if there is none."""
    branches, tags = hub.refs()
    names: dict[str, list[str]] = {}
    for name, commit in [*tags.items(), *branches.items()]:
        names.setdefault(commit, []).append(name)
    links = {commit: _manifest_or_none(hub, commit) for commit in names}
    if not any(links.values()):
        raise ValueError(f"{hub.flag} {hub.repo} on {hub.endpoint} is not a release: no revision has a {MANIFEST}")
    revisions: list[Revision] = []
    aliases: dict[str, str] = {}
    for commit, some in names.items():
        link = links[commit]
        own = link.manifest.revision if link is not None and link.manifest.revision in some else None
        for name in dict.fromkeys(some):
            if own is None or name == own:
                revisions.append(HubRevision(name, hub, commit, download))
            else:
                aliases[name] = own
    clashes = sorted(name for name in tags.keys() & branches.keys() if tags[name] != branches[name])
    return Opened(hub.repo, revisions, aliases, clashes=clashes)


def _manifest_or_none(hub: Hub, commit: str) -> Link | None:
    try:
        content = hub.read(commit, MANIFEST)
    except FileNotFoundError:
        return None
    try:
        return parse_link(content, MANIFEST)
    except ValueError:  # reported when the revision is verified
        return None
