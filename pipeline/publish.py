"""Publish a store as a data set on the Hugging Face Hub.

The manifest is in the last commit, so a store that is pushed in part is no store to those who pull it. A push that was
interrupted is resumed by the same command: what the repository holds is compared by digest, and not sent again.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zpipe.pipeline.data_card import data_card
from zpipe.pipeline.hub import HubDataset, patiently, read_from_hub, session
from zpipe.pipeline.inspection import store_statistics
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
    read_manifest,
    write_extraction,
    write_manifest,
)
from zpipe.schemas.map_array import chunk_name, read_array
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_store import IndexFile, index_path, maps_path
from zpipe.schemas.storage import as_local, names_in
from zpipe.schemas.tensor_kinds import SAVED

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
    maps_only: bool = False
    """Leave the stores inside the store out, such as its logits."""
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
    """Names in the store's folder that are no part of a store, and were not sent."""
    card: str
    """The data card."""


@dataclass(frozen=True, kw_only=True)
class _Publication:
    """What a repository shall hold."""

    manifests: dict[str, StoreManifest]
    """Prefix of the names of a store's files -> its manifest, without what is private; that of the store itself, whose
    prefix is empty, is the first."""
    files: dict[str, Path]
    """Name in the repository -> file, of all that is published as it is."""
    first: dict[str, bytes]
    """Name -> content of what marks the repository as a store."""
    last: dict[str, bytes]
    """Name -> content of what makes it a whole store."""


def push_store(
    root: Path, dataset: HubDataset, config: PushConfig | None = None, *, progress: Progress = silent
) -> Pushed:
    """Verify a store and the stores inside it, such as its logits, and publish them.

    Only the files of the stores are sent: those that their manifests list. Of what a manifest says of this machine, the
    source of the shards and the place of the weights, only the last part of the path is published. Memory grows by
    some 140 bytes per sample, for the quantiles of the card, and 1 KB per file: a shard has three.

    Args:
        root: Folder of the store, which is finished.
        dataset: Where it is published; repository and branch are created where they are absent.
        config: How it is published.
        progress: Reports verification and files.

    Raises:
        UsageError: The repository holds something else, or is public although `private` is set.
        ZpipeError: A store is damaged, or the Hub refuses a request.
    """
    config = config or PushConfig()
    root = as_local(root)
    inner = [] if config.maps_only else [name for name in SAVED if (root / name / MANIFEST_NAME).exists()]
    roots = {"": root} | {f"{name}/": root / name for name in inner}
    if problems := [problem for path in roots.values() for problem in verify_store(path, progress=progress)]:
        raise ZpipeError(f"{root}: {len(problems)} problems; nothing was sent", problems)
    publication = _publication(roots, dataset, config.license)
    described = [*publication.first.values(), *publication.last.values()]
    size = sum(path.stat().st_size for path in publication.files.values()) + sum(map(len, described))
    sent = 0 if config.dry_run else _send(publication, dataset, config, progress)
    return Pushed(
        files=len(publication.files) + len(described),
        sent=sent,
        size_bytes=size,
        left_out=tuple(_left_out(roots)),
        card=publication.last[CARD_NAME].decode(),
    )


def _left_out(roots: Mapping[str, Path]) -> Iterator[str]:
    """The names in the folders of stores that are no part of them."""
    for prefix, root in roots.items():
        for name in names_in(root):
            if name not in _OF_A_STORE and f"{prefix}{name}/" not in roots:
                yield prefix + name


def _publication(roots: Mapping[str, Path], dataset: HubDataset, license: str | None) -> _Publication:
    """What is published of stores, which are whole.

    Args:
        roots: Prefix of the names of a store's files in the repository -> its folder.
        dataset: Where it is published, for the card.
        license: Identifier of the licence, for the card.
    """
    manifests = {prefix: _publishable(read_manifest(root), root) for prefix, root in roots.items()}
    files: dict[str, Path] = {}
    first: dict[str, bytes] = {}
    last: dict[str, bytes] = {}
    for prefix, manifest in manifests.items():
        for path in _shard_files(roots[prefix], manifest):
            files[prefix + path.relative_to(roots[prefix]).as_posix()] = path
        with tempfile.TemporaryDirectory(prefix="zpipe-") as scratch:
            write_manifest(Path(scratch), manifest)
            write_extraction(Path(scratch), manifest.provenance)
            first[prefix + EXTRACTION_NAME] = (Path(scratch) / EXTRACTION_NAME).read_bytes()
            last[prefix + MANIFEST_NAME] = (Path(scratch) / MANIFEST_NAME).read_bytes()
    root, manifest = roots[""], manifests[""]
    own = sum(path.stat().st_size for name, path in files.items() if name.startswith(("maps/", "index/")))
    own += len(first[EXTRACTION_NAME]) + len(last[MANIFEST_NAME])
    statistics = replace(store_statistics(root), manifest=manifest, size_bytes=own)
    card = data_card(
        statistics,
        str(dataset),
        license=license,
        has_digests=all("image_digest" in IndexFile(index_path(root, each.stem)).columns for each in manifest.shards),
        inner={prefix.rstrip("/"): inner for prefix, inner in manifests.items() if prefix},
    )
    return _Publication(manifests=manifests, files=files, first=first, last={CARD_NAME: card.encode()} | last)


def _shard_files(root: Path, manifest: StoreManifest) -> Iterator[Path]:
    """The files of the shards of a store."""
    chunk = chunk_name(1 + len(manifest.provenance.sample_shape))
    for shard in manifest.shards:
        array = maps_path(root, shard.stem)
        yield from (array / "zarr.json", index_path(root, shard.stem))
        if (array / chunk).is_file():
            yield array / chunk
        elif read_array(array)[1]:  # an array of zeros may have no chunk
            raise ZpipeError(f"{array}: its chunk is not {chunk}, as its manifest has it; extract again")


def _publishable(manifest: StoreManifest, root: Path) -> StoreManifest:
    """The manifest without the folders of this machine. Its fingerprint stays: places of weights are not compared."""
    if found := next(_local_paths(manifest.provenance.compared()), ""):
        raise ZpipeError(
            f"{root}: its provenance holds a path of this machine ({found}), which decides what it is compared with; "
            "extract again without it"
        )
    files: dict[str, Any] = {
        name: _last_part(getattr(manifest.provenance, name)) for name in ("weights", "head", "class_embeddings")
    }
    provenance = replace(manifest.provenance, **files)
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
    remote = {name: file for name, file in remote.items() if name not in opening}
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
    """What has to be removed from the repository: its manifests, before any file; and files of other stores, after it.

    Raises:
        UsageError: It holds something else, or another store that may not be replaced.
    """
    dataset = repository.dataset
    foreign = [name for name in remote if name not in _BESIDE_A_STORE]
    if foreign and EXTRACTION_NAME not in remote and MANIFEST_NAME not in remote:
        raise UsageError(f"{dataset}: holds something else ({foreign[0]}); give a new repository, or one of a store")
    prefixes = ["", *(f"{name}/" for name in SAVED)]
    is_changed = False
    for prefix in prefixes:
        listed = _finished(repository, remote, prefix)
        provenance = listed.provenance if listed else _begun(repository, remote, prefix)
        if provenance is None:
            continue
        wanted = publication.manifests.get(prefix)
        why = _difference(provenance, listed, wanted)
        if why and not may_replace:
            name = f"{dataset}/{prefix}".rstrip("/")
            raise UsageError(f"{name}: holds {why}; give --replace, or another repository")
        # A store that only grows can be read meanwhile.
        is_changed |= bool(why) or (listed is not None and wanted is not None and not _grows(listed, wanted))
    published = {*publication.files, *publication.first, *publication.last}
    ours = tuple(f"{prefix}{folder}/" for prefix in prefixes for folder in ("maps", "index"))
    marks = tuple(f"{prefix}{name}" for prefix in prefixes for name in (EXTRACTION_NAME, MANIFEST_NAME))
    manifests = [
        f"{prefix}{MANIFEST_NAME}" for prefix in prefixes if is_changed and f"{prefix}{MANIFEST_NAME}" in remote
    ]
    stale = [name for name in remote if (name.startswith(ours) or name in marks) and name not in published]
    return manifests, [name for name in stale if name not in manifests]


def _difference(provenance: Provenance, listed: StoreManifest | None, wanted: StoreManifest | None) -> str:
    """What a store of the repository is if this push does not complete it; empty if it does.

    Args:
        provenance: Its provenance.
        listed: Its manifest, if it is finished.
        wanted: The manifest that is to be published in its place, if any.
    """
    if wanted is None:
        return "a store, and the one to push has none there"
    if provenance.fingerprint() != wanted.provenance.fingerprint():
        return "another store, of other maps"
    lost = sorted({shard.stem for shard in listed.shards} - {shard.stem for shard in wanted.shards}) if listed else []
    return f"another store, has a shard {lost[0]} that this one lacks" if lost else ""


def _grows(listed: StoreManifest, wanted: StoreManifest) -> bool:
    return set(listed.shards) <= set(wanted.shards)


def _finished(repository: _Repository, remote: dict[str, RepoFile], prefix: str) -> StoreManifest | None:
    """The manifest of a store that the repository holds, if any."""
    name = prefix + MANIFEST_NAME
    if name not in remote:
        return None
    return decode_manifest(repository.read(name, MANIFEST.max_bytes), f"{repository.dataset}/{name}")


def _begun(repository: _Repository, remote: dict[str, RepoFile], prefix: str) -> Provenance | None:
    """The provenance of a store that an interrupted push began, if any."""
    name = prefix + EXTRACTION_NAME
    if name not in remote:
        return None
    return decode_extraction(repository.read(name, EXTRACTION.max_bytes), f"{repository.dataset}/{name}")


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
