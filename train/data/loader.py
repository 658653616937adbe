"""Batches of images, labels and relevance maps from tar shards and a relevance store."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import numpy as np
import torch

from zpipe.schemas.account import Account
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.progress import Progress
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.storage import as_path
from zpipe.train.data.batches import Arrays, BatchMemory, Field, Part, image_field, merge, stage, staged_batches
from zpipe.train.data.damage import DamageLog
from zpipe.train.data.join import Damaged, Missing
from zpipe.train.data.map_stores import ImageStore, Join, MapSource, TarStore, check_frame
from zpipe.train.data.order import (
    Plan,
    deal,
    fresh_per_batch,
    lane_count,
    plan_epoch,
    shard_order,
    whole_batches,
)
from zpipe.train.data.processes import end_workers, start_workers
from zpipe.train.data.stream import digests_are_checked, list_shards
from zpipe.train.data.transforms import Augment, ViewConfig
from zpipe.train.data.worker import BatchParts, EpochSpec
from zpipe.train.signals import deferred_signals

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
# What a batch holds besides tensors of stores, and what its parts hold on the way.
BATCH_FIELDS = (
    *("image", "label", "box", "flipped", "key", "object_box", "object_boxes"),
    *("slot", "damaged", "notes", "erased", "view"),
)


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """A position in a loader's epoch, and what identifies the data set; see `RelevanceLoader.state_dict`."""

    epoch: Count
    """Number of the epoch."""
    batch: Count
    """Batches of the epoch that were yielded."""
    lanes: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    """Lanes of the epoch, see `order`."""
    seed: int
    """Seed of the loader."""
    batch_size: Positive
    """Samples of a rank in a batch."""
    world_size: Positive
    """Number of ranks."""
    repeats: Positive
    """How often a batch holds a sample."""
    digest: str | None = None
    """Digest of the shards; None in a state of an earlier version, and then not compared."""
    samples: Count | None = None
    """Number of samples, as `digest`."""


class RelevanceLoader:
    """Iterates over batches of images and maps.

    A batch is a dictionary:

        image      uint8 [B, 3, S, S], not normalised: the model's mean and std are applied where it runs
        label      int64 [B]
        relevance  float32 [B, gh, gw] in [0, 1], the map under the same crop and flip (if `maps` is given; of several
                   stores, each under its name: dense tensors under the same crop and flip, vectors as they are)
        box        float32 [B, 4], the crop in source pixels (x1, y1, x2, y2)
        flipped    bool [B]
        key        list of B str
        object_box float32 [B, 4], the object's box in fractions of the crop (if every sample's .json has a `box`)
        object_boxes  list of B float32 tensors [n, 4], the boxes of all objects of the label's class in fractions of
                   the crop (in evaluation)

    The order is that of `zpipe.train.data.order`. An epoch holds every sample once; training drops the last samples,
    which fill no batch (`epoch_counts` says how many). In training, each rank takes `batch_size` samples of every
    batch, so the batches of all ranks together are those of one process with `batch_size * world_size`, and all ranks
    take `len(loader)` steps. Evaluation deals whole shards to ranks; a rank without shards yields nothing. The view of
    a sample depends on (seed, epoch, sample, repeat) only.

    A `state_dict()` that is taken after a batch and loaded into a new loader, in the same or another process, continues
    with the next batch. The batches are the same, also with another number of workers, and in training with another
    number of ranks if `batch_size * world_size` is unchanged.

    The first epoch compares the digest of each tar with `shards.json`; ZPIPE_CHECK_DIGESTS=0 in the environment spares
    that.

    Each of the 8 or so shards that an epoch is mixed from is held undecoded in one worker of all ranks: 110 MB each for
    ImageNet in tars of 1,000.

    Args:
        shards: Folder or URL of tars that `zpipe make-shards` wrote, public tars (jpg + cls or json), or one tar.
        maps: Relevance store: a path, a URL or an open store; or several by the names that their tensors shall have in
            a batch: ``{"relevance": "maps/train", "logits": "maps/train/logits"}``.
        batch_size: Samples of this rank in a batch.
        image_size: Side S of the images, in pixels.
        augment: "train" (random crops and flips, shuffled) or "eval" (centre crops, every sample, in order).
        seed: Seed of the order and of the augmentation.
        num_workers: Data-loading processes; 0 loads in this process.
        rank: Number of this training process.
        world_size: Number of training processes.
        missing: How to handle samples without a usable map: "error", "skip" (leave them out), "uniform" (a map of
            ones).
        damaged: How to handle damaged tars, and samples whose image, label or .json is broken: "error", or "skip",
            which makes batches smaller and records what it left out in `damage`. In training a batch may then be
            empty, so that all ranks take equally many steps.
        join: "tar": the stores were made from these very tars. "image": a map belongs to the sample whose image has the
            same digest, whatever tars, keys and order they come in; `coverage` says how many have one.
        repeats: How often a training batch holds each of its samples, in different views (repeated augmentation, Hoffer
            et al. 2020). An epoch has as many batches as without repeats and sees a part of the samples, another one
            every time.
        view: Crop, flip and colour settings; `augment` overrides its mode.
        pin_memory: Whether images and maps lie in page-locked memory, from which copies to a CUDA device are
            asynchronous.

    Raises:
        UsageError: If an argument is out of range, or there are no shards.
        ZpipeError: If shards or store can't be read, or the store does not serve these shards and views. Iterating
            raises it too, naming the folder, tar or key.
    """

    def __init__(
        self,
        shards: str | Path,
        maps: str | Path | RelevanceMaps | Mapping[str, str | Path | RelevanceMaps] | None = None,
        *,
        batch_size: int,
        image_size: int = 224,
        augment: Augment = "train",
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        missing: Missing = "error",
        damaged: Damaged = "error",
        join: Join = "tar",
        repeats: int = 1,
        view: ViewConfig | None = None,
        pin_memory: bool = False,
    ) -> None:
        low = batch_size < 1 or image_size < 1 or num_workers < 0 or seed < 0 or repeats < 1
        if low or not 0 <= rank < world_size:
            raise UsageError(
                f"batch_size={batch_size}, image_size={image_size}, rank={rank} of {world_size}, "
                f"num_workers={num_workers}, seed={seed}, repeats={repeats}: out of range"
            )
        if missing not in get_args(Missing):
            raise UsageError(f"missing={missing!r}; choose one of {', '.join(get_args(Missing))}")
        if damaged not in get_args(Damaged):
            raise UsageError(f"damaged={damaged!r}; choose error or skip")
        if join not in get_args(Join):
            raise UsageError(f"join={join!r}; choose tar or image")
        if augment not in get_args(Augment):
            raise UsageError(f"augment={augment!r}; choose train or eval")
        if pin_memory and not torch.cuda.is_available():
            raise UsageError("pin_memory=True: torch sees no CUDA device here; leave it out")
        self.path = as_path(shards)
        self.shards, self.index = list_shards(self.path)
        self.batch_size, self.image_size, self.seed = batch_size, image_size, seed
        self.num_workers, self.rank, self.world_size = num_workers, rank, world_size
        self.missing: Missing = missing
        self.damaged: Damaged = damaged
        self.damage = DamageLog()
        self.view = replace(view or ViewConfig(), augment=augment)
        self.train = augment == "train"
        self.repeats = repeats if self.train else 1
        self.pin_memory = pin_memory
        self.epoch = 0
        self._lanes = self._own_lanes()
        self._start = 0  # the batch that the next iteration begins with
        self._next = 0  # the batch after the last one yielded
        self._verified = not digests_are_checked()  # whether an epoch has compared the digests of the tars
        # Shards of one size share one array of rows: with a million shards, the arrays would cost more than their
        # contents.
        whole = {count: np.arange(count, dtype=np.int32) for count in {shard.entry.count for shard in self.shards}}
        self._rows = [whole[shard.entry.count] for shard in self.shards]
        self._unusable = 0
        self.join: Join = join
        named = maps if isinstance(maps, Mapping) else {} if maps is None else {"relevance": maps}
        self.stores = {name: self._joined(name, store) for name, store in named.items()}
        if self.maps is not None and self.maps.manifest.provenance.kind != "map":
            raise UsageError(
                f"{self.maps.path}: holds {self.maps.manifest.provenance.kind}, not one map for each image; give a "
                'store of maps (RelevanceLoader takes this one under a name of its own: {"logits": store})'
            )
        if missing != "error":
            self._leave_out_unusable()

    def _joined(self, name: str, store: str | Path | RelevanceMaps) -> MapSource:
        """A store joined with the shards."""
        if name in BATCH_FIELDS or not name.isidentifier():
            raise UsageError(f"maps: {name!r} can't name a tensor of a batch; give another name")
        maps = store if isinstance(store, RelevanceMaps) else RelevanceMaps(store)
        # Maps of a teacher; masks that a user wrote keep their values.
        scaled = maps.kind.is_relevance and maps.manifest.provenance.teacher
        maps = RelevanceMaps(maps.path, normalise="minmax" if scaled else None, check=maps.check)
        check_frame(maps, self.view)
        if self.missing == "uniform" and not maps.kind.is_relevance:
            raise UsageError(
                f'{maps.path}: holds {maps.manifest.provenance.kind}, of which none is uniform; give missing="skip"'
            )
        if self.join == "tar":
            return TarStore(maps, self.shards)
        first = self.shards[0]
        found = ImageStore(maps, self.shards, self.path if first.entry.folder else first.path.parent)
        if self.missing == "error" and found.found < found.count:
            raise ZpipeError(
                f"{maps.path}: {found.count - found.found} of {found.count} images of {self.path} have no map, "
                f"{found.first_missing} the first; give --missing skip, or a store that has them"
            )
        return found

    def report_coverage(self, progress: Progress) -> None:
        """Report, before an epoch begins, how many images have a map in each store that is joined by image."""
        for store in self.stores.values():
            if isinstance(store, ImageStore):
                other = {"other_label": store.relabelled} if store.relabelled else {}
                progress("images with a map", store.found, store.count, store=str(store.maps.path), **other)

    def _leave_out_unusable(self) -> None:
        """Count the samples that lack a usable tensor of any store, and leave them out if `missing` is "skip"."""
        rows = self._rows
        for store in self.stores.values():
            pairs = zip(rows, store.usable(), strict=True)
            # Rows that are all usable stay the array that shards share.
            rows = [every if len(some) == len(every) else np.intersect1d(every, some) for every, some in pairs]
        self._unusable = self.sample_count - sum(map(len, rows))
        if self.missing == "skip":
            self._rows = rows

    @property
    def maps(self) -> RelevanceMaps | None:
        """The store of the relevance maps, if there is one."""
        return self.stores["relevance"].maps if "relevance" in self.stores else None

    @property
    def coverage(self) -> list[str]:
        """A line for each store that is joined by image: how many images have a map."""
        lines = []
        for store in self.stores.values():
            if isinstance(store, ImageStore):
                other = f"; {store.relabelled:,} of them have another label there" if store.relabelled else ""
                lines.append(f"{store.maps.path}: {store.found:,} of {store.count:,} images have a map{other}")
        return lines

    @property
    def damaged_shards(self) -> list[str]:
        """The damaged tars that were left out, with the reason, one line each."""
        return self.damage.shards

    @property
    def damaged_samples(self) -> list[str]:
        """The first damaged samples that were left out, with the reason; `damage.places` has the places of all."""
        return self.damage.samples

    @property
    def sample_count(self) -> int:
        """Samples in the data set (all ranks), without those that `missing="skip"` leaves out."""
        return sum(map(len, self._rows))

    def draw(self, count: int, *, shards: int, seed: int = 0) -> int:
        """Restrict the loader to `count` random samples, in their present order.

        The samples come from `shards` random shards, and from more only if these hold too few, so that looking at a few
        samples of a large data set reads little of it.

        Returns:
            The number of shards that the samples come from.

        Raises:
            UsageError: If the loader is for training.
        """
        if self.train:
            raise UsageError("samples are drawn for looking at them; training takes all of them")
        rng = np.random.default_rng(seed)
        chosen: list[int] = []
        held = 0
        for shard in rng.permutation(len(self.shards)).tolist():
            if len(chosen) >= shards and held >= count:
                break
            chosen.append(shard)
            held += len(self._rows[shard])
        chosen.sort()
        rows = [(shard, int(row)) for shard in chosen for row in self._rows[shard]]
        kept = np.sort(rng.choice(len(rows), size=min(count, len(rows)), replace=False)).tolist()
        drawn: dict[int, list[int]] = {shard: [] for shard in range(len(self.shards))}
        for shard, row in (rows[place] for place in kept):
            drawn[shard].append(row)
        self._rows = [np.asarray(drawn[shard], np.int64) for shard in range(len(self.shards))]
        return sum(1 for own in drawn.values() if own)

    @property
    def global_batch(self) -> int:
        """Samples in a batch of all ranks together, repeats counted."""
        return self.batch_size * self.world_size

    def epoch_counts(self) -> dict[str, int]:
        """Count how an epoch uses the samples of all ranks.

        Returns:
            `served`; `dropped` (they fill no batch, or repeats of others take their place); and, unless `missing` is
            "error", `skipped` or `uniform` (no usable map).
        """
        fresh = fresh_per_batch(self.global_batch, self.repeats)
        served = len(self) * fresh if self.train else self.sample_count
        counts = {"served": served, "dropped": self.sample_count - served}
        if self.missing != "error":
            counts["skipped" if self.missing == "skip" else "uniform"] = self._unusable
        return counts

    def account(self) -> Account:
        """What became of the samples of this rank's evaluation, or of all epochs so far."""
        left_out: Counter[str] = Counter()
        if self.missing == "skip":
            left_out["no usable map"] = self._unusable
        left_out["in damaged tars"] = sum(len(self._rows[shard]) for shard in self.damage.shard_numbers)
        left_out["damaged"] = len(self.damage.places)
        seen = self.sample_count + left_out["no usable map"]
        return Account(seen=seen, taken=seen - left_out.total(), left_out=+left_out)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. It begins at its start, unless it is the epoch of a loaded state."""
        if epoch != self.epoch:
            self.epoch, self._start, self._next = epoch, 0, 0
            self._lanes = self._own_lanes()

    def _own_lanes(self) -> int:
        workers = max(1, self.num_workers)
        return lane_count(workers * self.world_size if self.train else workers, train=self.train)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the number of samples and the keys of each shard, in order; independent of the path."""
        lines = (f"{shard.entry.count} {shard.entry.keys_sha256}\n" for shard in self.shards)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch that was yielded last, and what identifies the data set. A few JSON values."""
        return {
            "epoch": self.epoch,
            "batch": self._next,
            "lanes": self._lanes,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "repeats": self.repeats,
            "digest": self.digest,
            "samples": self.sample_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken.

        A state of an earlier version may lack `digest` and `samples`; these are then not compared.

        Raises:
            UsageError: If this loader has other samples, or another order, or the state is none.
        """
        try:
            found = msgspec.convert(state, LoaderState)
        except msgspec.ValidationError as error:
            raise UsageError(
                f"{self.path}: not a state of a RelevanceLoader ({error}); begin with the next epoch, or start over"
            ) from error
        names = ["seed", "repeats"]
        if not self.train or found.batch_size * found.world_size != self.global_batch:
            names += ["batch_size", "world_size"]
        for name in names:
            if getattr(found, name) != getattr(self, name):
                raise UsageError(
                    f"{self.path}: the state was taken with {name}={getattr(found, name)}, this loader has "
                    f"{getattr(self, name)}; use the same, or begin with the next epoch"
                )
        if found.digest is not None and found.digest != self.digest:
            raise UsageError(
                f"{self.path}: the state was taken over other shards (digest={found.digest[:12]}, here "
                f"{self.digest[:12]}); use the same, or begin with the next epoch"
            )
        if found.samples is not None and found.samples != self.sample_count:
            raise UsageError(
                f"{self.path}: the state was taken over {found.samples} samples, this loader has "
                f"{self.sample_count} of the same shards; give the same maps and missing=, or begin with the next epoch"
            )
        if found.batch > len(self):
            raise UsageError(
                f"{self.path}: the state was taken behind batch {found.batch}, an epoch here has {len(self)}; "
                "use the same data, or begin with the next epoch"
            )
        self.epoch, self._lanes = found.epoch, found.lanes
        self._start = self._next = found.batch

    def __len__(self) -> int:
        """Batches of a whole epoch; in training the same on all ranks."""
        if self.train:
            return self.sample_count // self.global_batch
        return -(-sum(len(self._rows[shard]) for shard in self._shards_to_evaluate()) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        total = len(self)
        if total == 0 and not self.train and self.world_size > 1:  # the other ranks have all shards
            return
        if total == 0:
            ranks = "" if self.world_size == 1 else f" on each of {self.world_size} ranks"
            raise UsageError(
                f"{self.path}: too few samples ({self.sample_count}) for one batch of {self.batch_size}{ranks}; lower "
                "the batch size, or add data"
            )
        start, self._start = self._start, 0
        self._next = start % total if start == total else start
        if start == total:  # the state of a finished epoch
            return
        served = 0
        fields, rows = self._fields(), min(self.batch_size, self.sample_count)
        staging = [stage(fields, rows) for _ in range(staged_batches(self.num_workers))]
        memory = BatchMemory(fields, rows, pinned=self.pin_memory)
        parts = self._start_workers(range(start, total), staging)
        try:
            for number in range(start, total):
                received = [self._checked(next(parts, None), number, total) for _ in range(max(1, self.num_workers))]
                batch = merge(received, staging[(number - start) % len(staging)], memory)
                self.damage.add(batch.pop("damaged"))
                self._next = number + 1
                self._verified |= start == 0 and self._next == total
                served += len(batch["key"])
                # Evaluation needs no equal number of batches on all ranks.
                if batch["key"] or self.train:
                    yield batch
        finally:
            with deferred_signals():
                end_workers(parts)
                del parts
        if not served and not start and self.world_size == 1:
            reason = (self.damaged_samples or self.damaged_shards)[0]
            raise ZpipeError(f"{self.path}: no sample of the epoch can be used; the first one: {reason}")

    def _fields(self) -> dict[str, Field]:
        """The tensors of a batch that are large."""
        fields = {"image": image_field(self.image_size)}
        for name, store in self.stores.items():
            dtype = np.dtype(np.int32 if store.maps.kind.dtype.kind == "i" else np.float32)
            fields[name] = Field(store.maps.manifest.provenance.sample_shape, dtype)
        return fields

    def _start_workers(self, batches: range, staging: Sequence[Arrays]) -> Iterator[Part | ZpipeError]:
        """Begin the parts of these batches, one of each worker after the other."""
        for store in self.stores.values():
            if isinstance(store, ImageStore):
                store.copy()  # before data-loading processes start, which share it
        return start_workers(BatchParts(self._epoch_spec(batches), staging), self.num_workers)

    def _checked(self, part: Part | ZpipeError | None, number: int, total: int) -> Part:
        if part is None:
            raise ZpipeError(
                f"{self.path}: a data-loading process ended at batch {number} of {total} without a word; "
                "run the same command with --data-workers 0 to see why"
            )
        if isinstance(part, ZpipeError):
            raise part
        return part

    def _epoch_spec(self, batches: range) -> EpochSpec:
        return EpochSpec(
            epoch=self.epoch,
            seed=self.seed,
            batches=batches,
            batch_size=self.batch_size,
            plan=partial(self.plan, self.epoch),
            lane_stride=self.world_size if self.train else 1,
            shards=self.shards,
            stores=self.stores,
            missing=self.missing,
            damaged=self.damaged,
            check=not self._verified,
            image_size=self.image_size,
            view=self.view,
        )

    def _shards_to_evaluate(self) -> np.ndarray:
        return np.arange(len(self.shards))[self.rank :: self.world_size]

    def plan(self, epoch: int) -> Plan:
        """This rank's samples of an epoch, in order."""
        order = (
            shard_order(len(self.shards), self.seed, epoch, shuffle=True) if self.train else self._shards_to_evaluate()
        )
        rows = [self._rows[shard] for shard in order]
        plan = plan_epoch(order.tolist(), rows, self._lanes, seed=self.seed, epoch=epoch, shuffle=self.train)
        if not self.train:
            return plan
        plan = whole_batches(plan, self.global_batch, self.repeats)
        return plan[deal(plan, self.global_batch, self.world_size) == self.rank]
