"""Publish a store as a data set on the Hugging Face Hub.

The manifest is in the last commit, so a store that is pushed in part is no store to those who pull it. A push that was
interrupted is resumed by the same command: what the repository holds is compared by digest, and not sent again.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zpipe.pipeline.data_card import data_card
from zpipe.pipeline.hub import HubDataset, patiently, read_from_hub, session
from zpipe.pipeline.inspection import StoreStatistics, store_statistics
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import (
    EXTRACTION,
    EXTRACTION_NAME,
    MANIFEST,
    MANIFEST_NAME,
    Provenance,
    StoreManifest,
    decode_extraction,
    decode_manifest,
    write_extraction,
    write_manifest,
)
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_store import index_path, maps_path
from zpipe.schemas.storage import as_local, names_in

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

T = TypeVar("T")

CARD_NAME = "README.md"
COMMIT_FILES = 300  # those of 100 shards
MAX_REMOTE_FILES = 1_000_000
_OF_A_STORE = ("index", "maps", EXTRACTION_NAME, MANIFEST_NAME)
# What the Hub itself or its pages put into a repository that is new.
_BESIDE_A_STORE = (".gitattributes", CARD_NAME, "LICENSE")


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """How a store is published."""

    private: bool = False
    """Create the repository as a private one."""
    license: str | None = None
    """Identifier of the licence of the maps, as the Hub lists them; None states none."""
    replace: bool = False
    """Replace the other store that the repository holds."""
    dry_run: bool = False
    """Send nothing."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What became of a push."""

    files: int
    """Number of files of the store, those that describe it included."""
    sent: int
    """Number of files that the repository lacked; of a dry run, 0."""
    size_bytes: int
    """Size of the store in bytes."""
    left_out: tuple[str, ...]
    """Names in the store's folder that are no part of the store, and were not sent."""
    card: str
    """The data card."""


@dataclass(frozen=True, kw_only=True)
class _Publication:
    """What a repository shall hold."""

    manifest: StoreManifest
    """The manifest, without what is private."""
    files: dict[str, Path]
    """Name in the repository -> file, of all that is published as it is."""
    first: dict[str, bytes]
    """Name -> content of what marks the repository as a store."""
    last: dict[str, bytes]
    """Name -> content of what makes it a whole store."""


def push_store(
    root: Path, dataset: HubDataset, config: PushConfig | None = None, *, progress: Progress = silent
) -> Pushed:
    """Verify a store and publish it.

    Only the files of the store are sent: those that its manifest lists. Of what its manifest says of this machine, the
    source of the shards and the place of the weights, only the last part of the path is published. Memory grows by
    some 140 bytes per sample, for the quantiles of the card, and 1 KB per file: a shard has three.

    Args:
        root: Folder of the store, which is finished.
        dataset: Where it is published; repository and branch are created where they are absent.
        config: How it is published.
        progress: Reports verification and files.

    Raises:
        UsageError: The repository holds something else, or is public though a private one was asked for.
        ZpipeError: The store is damaged, or the Hub refuses a request.
    """
    config = config or PushConfig()
    root = as_local(root)
    if problems := verify_store(root, progress=progress):
        raise ZpipeError(f"{root}: {len(problems)} problems; nothing was sent", problems)
    statistics = store_statistics(root)
    publication = _publication(root, statistics, dataset, config.license)
    described = [*publication.first.values(), *publication.last.values()]
    size = sum(path.stat().st_size for path in publication.files.values()) + sum(map(len, described))
    sent = 0 if config.dry_run else _send(publication, dataset, config, progress)
    return Pushed(
        files=len(publication.files) + len(described),
        sent=sent,
        size_bytes=size,
        left_out=tuple(name for name in names_in(root) if name not in _OF_A_STORE),
        card=publication.last[CARD_NAME].decode(),
    )


def _publication(root: Path, statistics: StoreStatistics, dataset: HubDataset, license: str | None) -> _Publication:
    manifest = _publishable(statistics.manifest, root)
    files: dict[str, Path] = {}
    for shard in manifest.shards:
        array = maps_path(root, shard.stem)
        # An array of zeros may have no chunk.
        for path in (array / "zarr.json", array / "c" / "0" / "0" / "0", index_path(root, shard.stem)):
            if path.is_file():
                files[path.relative_to(root).as_posix()] = path
    with tempfile.TemporaryDirectory(prefix="zpipe-") as scratch:
        write_manifest(Path(scratch), manifest)
        write_extraction(Path(scratch), manifest.provenance)
        content = {name: (Path(scratch) / name).read_bytes() for name in (EXTRACTION_NAME, MANIFEST_NAME)}
    card = data_card(replace(statistics, manifest=manifest), str(dataset), license=license)
    return _Publication(
        manifest=manifest,
        files=files,
        first={EXTRACTION_NAME: content[EXTRACTION_NAME]},
        last={CARD_NAME: card.encode(), MANIFEST_NAME: content[MANIFEST_NAME]},
    )


def _publishable(manifest: StoreManifest, root: Path) -> StoreManifest:
    """The manifest without the folders of this machine. Its fingerprint stays: the weights' place is not compared."""
    if found := next(_local_paths(manifest.provenance.compared()), ""):
        raise ZpipeError(
            f"{root}: its provenance holds a path of this machine ({found}), which decides what it is compared with; "
            "extract again without it"
        )
    provenance = replace(manifest.provenance, weights=_last_part(manifest.provenance.weights))
    return replace(manifest, provenance=provenance, source=_last_part(manifest.source))


def _last_part(path: str) -> str:
    return path.rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def _local_paths(value: Any) -> Iterator[str]:
    """The texts in JSON values that are paths of a machine."""
    if isinstance(value, str) and value.startswith(("/", "~/", "file:")):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _local_paths(each)


class _Repository:
    """The repository that a store is pushed to."""

    def __init__(self, dataset: HubDataset) -> None:
        from huggingface_hub import HfApi

        self.api: HfApi = HfApi()
        self.dataset = dataset
        self._never = threading.Event()  # waiting ends by Ctrl-C here, in the main thread

    def create(self, private: bool) -> None:
        """Create repository and branch unless they exist."""
        name, revision = self.dataset.name, self.dataset.revision
        self._request(lambda: self.api.create_repo(name, repo_type="dataset", private=private or None, exist_ok=True))
        if private and not self._request(lambda: self.api.dataset_info(name)).private:
            raise UsageError(
                f"{self.dataset}: exists and is public; make it private on its page, or leave --private out"
            )
        if revision != "main":
            self._request(lambda: self.api.create_branch(name, repo_type="dataset", branch=revision, exist_ok=True))

    def files(self) -> dict[str, RepoFile]:
        """The files of the repository by name, about 1 KB each."""
        from huggingface_hub.hf_api import RepoFile

        def listed() -> dict[str, RepoFile]:
            tree = self.api.list_repo_tree(
                self.dataset.name, repo_type="dataset", revision=self.dataset.revision, recursive=True
            )
            entries = list(islice(tree, MAX_REMOTE_FILES + 1))
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

        found = self._request(listed)
        if len(found) > MAX_REMOTE_FILES:
            raise ZpipeError(f"{self.dataset}: holds more than {MAX_REMOTE_FILES} files; give another repository")
        return found

    def read(self, name: str, max_bytes: int) -> bytes:
        """The content of a file."""
        return patiently(lambda: read_from_hub(self.dataset, name, max_bytes), f"{self.dataset}/{name}", self._never)

    def commit(self, message: str, files: dict[str, Path | bytes], removed: list[str]) -> None:
        """Add or replace files and remove others, in one commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        def request() -> None:
            operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in removed]
            operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()]
            self.api.create_commit(
                self.dataset.name,
                operations,
                commit_message=message,
                repo_type="dataset",
                revision=self.dataset.revision,
            )

        self._request(request)

    def _request(self, request: Callable[[], T]) -> T:
        session()  # the waits of all that follows are bounded
        return patiently(request, self.dataset, self._never)


def _send(publication: _Publication, dataset: HubDataset, config: PushConfig, progress: Progress) -> int:
    """Bring the repository into the state of the publication, the manifest last. Returns the number of files sent."""
    repository = _Repository(dataset)
    repository.create(config.private)
    remote = repository.files()
    opening, stale = _opening(repository, publication, remote, config.replace)
    marks = {name: data for name, data in publication.first.items() if not _is_same(remote.get(name), data)}
    if marks or opening:
        repository.commit("Begin a relevance store", dict(marks), opening)
    sent = len(marks)
    names, total = list(publication.files), len(publication.files)
    for start in range(0, len(stale), COMMIT_FILES):
        repository.commit("Remove the shards of another store", {}, stale[start : start + COMMIT_FILES])
    batch: dict[str, Path | bytes] = {}
    for number, name in enumerate(names, start=1):
        if not _is_same(remote.get(name), publication.files[name]):
            batch[name] = publication.files[name]
        if len(batch) == COMMIT_FILES or (number == total and batch):
            repository.commit(f"Relevance maps, {number} of {total} files", batch, [])
            sent += len(batch)
            batch = {}
        progress("push", number, total, sent=sent)
    _check_whole(publication, dataset, repository.files())
    rest = {name: data for name, data in publication.last.items() if not _is_same(remote.get(name), data)}
    if rest:
        repository.commit("Finish the relevance store", dict(rest), [])
    return sent + len(rest)


def _opening(
    repository: _Repository, publication: _Publication, remote: dict[str, RepoFile], may_replace: bool
) -> tuple[list[str], list[str]]:
    """What has to be removed from the repository: its manifest, before any file; and files of another store, after it.

    Raises:
        UsageError: It holds something else, or another store that may not be replaced.
    """
    dataset, wanted = repository.dataset, publication.manifest
    listed = _finished(repository, remote)
    provenance = listed.provenance if listed else _begun(repository, remote)
    foreign = [name for name in remote if name not in _BESIDE_A_STORE]
    if foreign and provenance is None:
        raise UsageError(f"{dataset}: holds something else ({foreign[0]}); give a new repository, or one of a store")
    differs = provenance is not None and provenance.fingerprint() != wanted.provenance.fingerprint()
    lost = sorted({shard.stem for shard in listed.shards} - {shard.stem for shard in wanted.shards}) if listed else []
    if (differs or lost) and not may_replace:
        why = f"has a shard {lost[0]} that this one lacks" if lost and not differs else "of other maps"
        raise UsageError(f"{dataset}: holds another store, {why}; give --replace, or another repository")
    stale = [name for name in remote if name.startswith(("maps/", "index/")) and name not in publication.files]
    # A store that only grows can be read meanwhile.
    changes = listed is not None and not set(listed.shards) <= set(wanted.shards)
    return ([MANIFEST_NAME] if changes or (differs and listed) else []), stale


def _finished(repository: _Repository, remote: dict[str, RepoFile]) -> StoreManifest | None:
    """The manifest that the repository holds, if any."""
    if MANIFEST_NAME not in remote:
        return None
    data = repository.read(MANIFEST_NAME, MANIFEST.max_bytes)
    return decode_manifest(data, f"{repository.dataset}/{MANIFEST_NAME}")


def _begun(repository: _Repository, remote: dict[str, RepoFile]) -> Provenance | None:
    """The provenance of the store that an interrupted push began, if any."""
    if EXTRACTION_NAME not in remote:
        return None
    data = repository.read(EXTRACTION_NAME, EXTRACTION.max_bytes)
    return decode_extraction(data, f"{repository.dataset}/{EXTRACTION_NAME}")


def _is_same(remote: RepoFile | None, content: Path | bytes) -> bool:
    """Whether a file of the repository has this content. The Hub has the SHA-256 of large files, else Git's SHA-1."""
    if remote is None:
        return False
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if remote.size != size:
        return False
    digest = hashlib.sha256() if remote.lfs else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    wanted = remote.lfs.sha256 if remote.lfs else remote.blob_id
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest() == wanted


def _check_whole(publication: _Publication, dataset: HubDataset, remote: dict[str, RepoFile]) -> None:
    """Check that the repository has every file, before its manifest says so."""
    missing = [
        name
        for name, path in publication.files.items()
        if name not in remote or remote[name].size != path.stat().st_size
    ]
    if missing:
        raise ZpipeError(
            f"{dataset}: lacks {len(missing)} files after the upload ({missing[0]}): ignored by its .gitignore, or "
            "another push is at work; mend that, then run again"
        )
