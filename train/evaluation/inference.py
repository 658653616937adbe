"""A finished run, ready to answer: the one place where images are normalised, scored and run through a model."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zpipe.schemas.account import Account
from zpipe.schemas.errors import UsageError
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.checkpoint import Preprocessing, Run
from zpipe.train.data.join import Damaged, Missing
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.map_stores import Join
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.device import data_workers_for, evaluation_context, keep_freed_memory, resolve_device, to_device
from zpipe.train.evaluation.metrics import LARGEST_LOGIT, check_numbers
from zpipe.train.models.operating_points import OperatingPoint, logits_of
from zpipe.train.models.zoom_tokens import token_boxes
from zpipe.train.scoring import ScoreSource, choose_source, run_model, score_use

MAX_REASONS = 20  # lines about damaged data in a results file


class Answer(NamedTuple):
    """What a run returns for a batch.

    Attributes:
        logits: [B, classes], of the stage that answered, if the model has two.
        scores: [B, s * s], as the model got them; None without scores.
        output: everything that the model returned, including the logits.
    """

    logits: Tensor
    scores: Tensor | None
    output: Any


class OpenRun:
    """A finished classifier with its normalisation and its source of scores, on one device, in one precision.

    Args:
        run: the run.
        source: where its scores come from, see `choose_run_source`; None for a model that takes none.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: of both scores and model: float32, never rounded to TF32, or bf16 or fp16 under autocast.

    Raises:
        UsageError: the run is not a classifier, or the device or the precision is unknown.
        ZpipeError: the device is not available.
    """

    def __init__(
        self, run: Run, source: ScoreSource | None, *, device: str = "auto", precision: str = "float32"
    ) -> None:
        if run.kind != "vit":
            raise UsageError(f"{run.path}: holds a {run.kind}, no classifier")
        self.run, self.source, self.precision = run, source, precision
        # Checked before the model gets them, which may refuse them in words of its own.
        self._checked = None if source is None else replace(source, score=partial(self._check_scores, source))
        self._where = str(run.path) if precision == "float32" else f"{run.path} in {precision}"
        self.device = resolve_device(device)
        self._context = evaluation_context(precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        # Any, because num_classes, the grid of a ZoomViT and the like are not declared by nn.Module.
        self.model: Any = run.model.to(self.device)
        if source is not None and source.zoomer is not None:
            source.zoomer.to(self.device)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Move the images of a batch to the device and normalise them: uint8 [B, 3, S, S] -> float32 [B, 3, S, S]."""
        return batch | {"image": self.run.preprocessing.normalise(to_device(batch["image"], self.device))}

    @torch.inference_mode()
    def respond(self, prepared: dict[str, Any], point: OperatingPoint) -> Answer:
        """Score and classify the images of a prepared batch at an operating point.

        Raises:
            ZpipeError: scores or logits are no numbers, or logits are far too large; the message names run and key.
        """
        with self._context():
            output, scores = run_model(self.model, self._checked, prepared, point)
        answered: Any = logits_of(output)
        for logits in answered if isinstance(answered, tuple) else (answered,):  # those of both stages, for calibration
            self.check_logits(logits, prepared)
        return Answer(answered, scores, output)

    def check_logits(self, logits: Tensor, batch: dict[str, Any]) -> None:
        """Check the logits [B, classes] of a batch; raises as `respond`."""
        check_numbers(logits, batch["key"], "the model's logits", limit=LARGEST_LOGIT, where=self._where)

    def _check_scores(self, source: ScoreSource, images: Tensor, batch: dict[str, Any]) -> Tensor | None:
        """What a source returns for images and their batch, checked."""
        scores = source.score(images, batch)
        if scores is not None and "key" in batch:  # there is none where only the cost of scoring is counted
            check_numbers(scores, batch["key"], f"the scores ({source.name})", where=self._where)
        return scores

    def answer(self, batch: dict[str, Any], point: OperatingPoint) -> Answer:
        """Normalise, score and classify the images of a batch, uint8 [B, 3, S, S], at an operating point."""
        return self.respond(self.prepare(batch), point)

    @torch.inference_mode()
    def scores(self, batch: dict[str, Any]) -> Tensor | None:
        """The scores [B, s * s] that the model would get for a batch; None for none. Raises as `respond`."""
        with self._context():
            return None if self._checked is None else self._checked.score(self.prepare(batch)["image"], batch)

    def token_boxes(
        self, prepared: dict[str, Any], scores: Tensor | None, point: OperatingPoint
    ) -> list[Tensor] | None:
        """The patches that the model cuts the images of a prepared batch into.

        Args:
            prepared: the batch.
            scores: the scores of its answer.
            point: the operating point of its answer.

        Returns:
            For each image, int64 [n, 4] as (left, top, right, bottom) in pixels, on the CPU. None without scores, and
            for a model whose patches do not depend on them.
        """
        if scores is None or not hasattr(self.model, "tokenise"):
            return None
        with torch.inference_mode(), self._context():
            ids = self.model.tokenise(prepared["image"], scores, **point.arguments).by_image()
        size = self.run.preprocessing.image_size
        # A released ZoomViT has tokens that stand for no place.
        return [token_boxes(each[each >= 0].cpu(), self.model.coarse_grid, size) for each in ids]


def trained_with(run: Run) -> str | None:
    """The name of the source whose scores a run was trained with; None for a model that takes none."""
    use = score_use(run.model)
    if use is None:
        return None
    if run.settings.get("scores") is not None:
        return str(run.settings["scores"])
    if run.zoomer is not None:
        return "zoomer"
    return "own" if use.has_own and run.settings.get("maps") is None else "maps"


def choose_run_source(run: Run, name: str | None, store: RelevanceMaps | None) -> ScoreSource | None:
    """Choose where a run's scores come from.

    Args:
        run: the run.
        name: one of `scoring.SOURCES`; None for the source that the run was trained with.
        store: the relevance store of the images, for the source "maps".

    Returns:
        The source; None for a model that takes no scores.

    Raises:
        UsageError: something that the source needs is missing, or a model that takes no scores is given a source.
    """
    if score_use(run.model) is None:
        if name is not None:
            raise UsageError(f"--scores {name}: the model of {run.path} takes no scores; leave it out")
        return None
    name = name or trained_with(run)
    if name == "zoomer" and run.zoomer is None:
        raise UsageError(f"{run.path}: was trained without a zoomer; give --scores, such as --maps STORE --scores maps")
    return choose_source(name or "", run.model, zoomer=run.zoomer, origin=run.path, store=store)


def eval_loader(
    preprocessing: Preprocessing,
    shards: Path,
    maps: Path | RelevanceMaps | Mapping[str, Path | RelevanceMaps] | None,
    *,
    batch_size: int,
    data_workers: int | None = 0,
    limit: int | None = None,
    missing: Missing = "uniform",
    damaged: Damaged = "error",
    join: Join = "tar",
    device: str = "cpu",
) -> RelevanceLoader:
    """Load every sample of the shards once, in the view that a run was made for.

    Args:
        preprocessing: of the run.
        shards: a folder of shards, or a tar.
        maps: their relevance store, or several by the names of their maps in a batch; None to load no maps.
        batch_size: images per batch.
        data_workers: processes that load data; 0 to load in this one. None is 0 for a CPU, and for a CUDA device up to
            16, as many as the machine has cores for; but 0 if a limit leaves out samples, because several processes
            load them in another order.
        limit: the largest number of samples that will be taken, from the first on; None for all.
        missing: how to handle samples without a usable map, see `RelevanceLoader`.
        damaged: how to handle damaged tars and samples, see `RelevanceLoader`.
        join: how maps find their images, see `RelevanceLoader`.
        device: the device that the batches will be moved to, by name.
    """
    on = resolve_device(device)
    load = partial(
        RelevanceLoader,
        shards,
        maps,
        batch_size=batch_size,
        image_size=preprocessing.image_size,
        augment="eval",
        missing=missing,
        damaged=damaged,
        join=join,
        view=ViewConfig(crop_pct=preprocessing.crop_pct),
        pin_memory=on.type == "cuda",
    )
    if data_workers is not None:
        return load(num_workers=data_workers)
    loader = load(num_workers=data_workers_for(on, on_cpu=0))
    return loader if limit is None or limit >= loader.sample_count else load(num_workers=0)


class Tally:
    """The batches of a loader, and the count of what they leave out, so that a figure can say so.

    Args:
        loader: the loader, of one process.
        limit: the largest number of samples to take; None for all.
    """

    def __init__(self, loader: RelevanceLoader, limit: int | None = None) -> None:
        self.loader = loader
        self.most = loader.sample_count if limit is None else min(limit, loader.sample_count)
        self.taken = 0
        self._served = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            self._served += len(batch["key"])
            left = self.most - self.taken
            batch = batch if len(batch["key"]) <= left else {name: values[:left] for name, values in batch.items()}
            self.taken += len(batch["key"])
            yield batch
            if self.taken >= self.most:
                return

    def account(self) -> Account:
        """What became of the samples so far: taken, damaged, or without a usable map."""
        come_by = min(self.loader.state_dict()["batch"] * self.loader.batch_size, self.loader.sample_count)
        without_map = self.loader.epoch_counts().get("skipped", 0)
        left_out = Counter({"damaged": come_by - self._served, "without a usable map": without_map})
        return Account(seen=self.taken + left_out.total(), taken=self.taken, left_out=+left_out)

    def stated(self) -> dict[str, Any]:
        """What a results file says of the images: how many there are, which were skipped and why, and their digest."""
        account = self.account()
        return {
            "samples": account.seen,
            "skipped": account.left_out.total(),
            "skipped_by": dict(account.left_out),
            "damaged": [*self.loader.damaged_shards, *self.loader.damaged_samples][:MAX_REASONS],
            # A line about images in tars without an index that belong to no sample; "" if there are none.
            "left_out_of_tars": self.loader.index.left_out,
            "images_digest": self.digest,
        }

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what identifies the images, wherever they are: the keys and, if known, the tars."""
        entries = (shard.entry for shard in self.loader.shards)
        lines = "".join(f"{entry.count} {entry.keys_sha256} {entry.sha256 or entry.bytes}\n" for entry in entries)
        return hashlib.sha256(lines.encode()).hexdigest()
