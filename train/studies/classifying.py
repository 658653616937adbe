"""Studies of the classifier: the size of its backbone, several crops of an image, and the causes of its errors."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch

from zpipe.schemas.errors import UsageError
from zpipe.train.evaluation.error_analysis import analyse_errors, error_results, write_errors
from zpipe.train.evaluation.evaluate import answers_for
from zpipe.train.evaluation.operating_points import operating_points
from zpipe.train.evaluation.results import Result, share
from zpipe.train.studies.bench import Bench


def backbone_size(bench: Bench) -> list[Result]:
    """Tiny, small and base backbones, or half and double the width, trained from scratch (Table 8)."""
    bench.need_zoomvit()
    config = bench.vit_config()
    named = "embed_dim" not in config.model_args
    rows: list[Result] = []
    for name, times in (("tiny", 0.5), ("small", 1.0), ("base", 2.0)):
        changes: dict[str, Any] = {"init_from": None}
        if named:
            changes["model"] = f"zoomvit_{name}_patch16_224"
        else:
            heads, width = config.model_args.get("num_heads", 6), config.model_args["embed_dim"]
            width = max(1, round(width * times / heads / 4)) * heads * 4
            name = f"width {width}"
            changes["model_args"] = config.model_args | {"embed_dim": width}
        for seed in bench.seeds:
            opened = bench.variant(name.replace(" ", "-"), seed, **changes)
            rows += bench.measured(opened, {"backbone": name}, bench.sweep())
    bench.notes.append("every size is trained from scratch, the run at hand is not among them if it was not")
    return rows


@torch.inference_mode()
def nine_crops(bench: Bench) -> list[Result]:
    """Whether any of nine crops of a larger image is classified correctly (Table 14)."""
    opened = bench.opened
    side = opened.preprocessing.image_size
    large = round(side * 384 / 224)
    loader = bench.loader(opened, image_size=large)
    ready = bench.ready(opened, loader, scores=bench.config.evaluation.scores)
    if ready.source is not None and ready.source.name == "maps":
        raise UsageError("study nine-crops: maps are of whole images; choose --scores zoomer or another")
    config = replace(bench.config.evaluation, **bench.one_zoom())
    zoom = operating_points(opened.model, ready.source, config)[0]
    answers = answers_for(opened, loader, config)
    places = [round((large - side) * step / 2) for step in range(3)]
    ranks: dict[str, list[torch.Tensor]] = {"any of 9": [], "centre of 9": [], "mean of 9": []}
    for number, batch in enumerate(bench.images(loader)):
        prepared = ready.prepare(batch)
        each, logits = [], []
        for top, left in itertools.product(places, places):
            crop = prepared["image"][:, :, top : top + side, left : left + side]
            crop_logits = ready.respond(prepared | {"image": crop}, zoom).logits
            logits.append(crop_logits.softmax(1))
            each.append(answers.ranks(crop_logits, batch))
        ranks["any of 9"].append(torch.stack(each).amin(0))
        ranks["centre of 9"].append(each[4])
        ranks["mean of 9"].append(answers.ranks(torch.stack(logits).mean(0), batch))
        bench.progress("nine-crops", number + 1, len(loader))
    rows = bench.measured(opened, {"view": "whole image"}, bench.one_zoom())
    for name, parts in ranks.items():
        judged = torch.cat(parts)
        judged = judged[judged >= 0]
        about = bench.about(opened) | {"setting": {"view": name, **zoom.settings}}
        rows.append(share(**about, metric="top1", n=len(judged), right=int((judged == 0).sum())))
    once = next(row.value for row in rows if row.metric == "gmacs")
    about = bench.about(opened) | {"setting": {"view": "any of 9", **zoom.settings}}
    return [*rows, Result(**about, metric="gmacs", n=1, value=9 * once)]


def errors(bench: Bench) -> list[Result]:
    """How often the zoom missed the object, in wrong and in right answers (section I)."""
    opened, loader = bench.opened, bench.loader(bench.opened)
    bench.need_zoomvit()
    ready = bench.ready(opened, loader, scores=bench.config.evaluation.scores)
    if ready.source is None or ready.source.name == "none":
        raise UsageError("study errors: nothing is zoomed")
    config = replace(bench.config.evaluation, **bench.one_zoom())
    zoom = operating_points(opened.model, ready.source, config)[0]
    answers = answers_for(opened, loader, config)
    verdicts, pictures = analyse_errors(ready, bench.images(loader), zoom, answers, bench.progress)
    write_errors(opened.path, verdicts, pictures)
    return error_results(verdicts, bench.about(opened), zoom)
