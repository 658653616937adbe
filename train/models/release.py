"""Checkpoints that papers' authors published, opened to compute what their code computes at batch size 1.

ZoomViT's authors released evaluation code and weights. Their model differs from the paper, and from ours, in what becomes
of tokens (see `ReleasedZoomViT`); with these differences kept, published weights give published numbers.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import register_model
from torch import Tensor, nn

from zpipe.train.models import zoom_tokens
from zpipe.train.models.backbone import build, untrained_cfgs
from zpipe.train.models.cfvit import CFViT
from zpipe.train.models.sparseformer import SparseFormer
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.models.zoomvit import Tokens, ZoomViT

_ZOOMER = "Importance_Score.model."


class ReleasedZoomViT(ZoomViT):
    """The ZoomViT of the authors' public code: DeiT-III blocks, 1-D sine-cosine positions, fixed zoom factor embedding.

    It differs from `ZoomViT` in the tokens:

    - A zero vector follows the fine and another the coarse tokens, and both take part in attention.
    - Fine tokens are those whose own place scores above alpha. At zoom factor 0.5 a cell is split if any of its four
      places does, and the other places of that cell are then not seen at all.
    - Cells that score exactly alpha are not seen either.

    Their batches pad shorter images with more zero vectors, so that logits depend on the batch; here every image is
    computed as their code does it alone. Images are normalised with ImageNet's mean and standard deviation.

    Args:
        alpha: the threshold that the authors fix at construction (Small .01, Tiny .03); calls may give another.
        Others as of `ZoomViT`.
    """

    def __init__(self, *args: Any, alpha: float, init_values: float | None = 1e-4, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, init_values=init_values, pos="sincos-1d", zfe="fixed")
        self.alpha = zoom_tokens.check_alpha(alpha)

    def forward_features(
        self,
        images: Tensor,
        scores: Tensor | None = None,
        alpha: float | None = None,
        keep_tokens: int | None = None,
        budget: int | str | None = None,
        prune: str = "backward",
    ) -> Tensor:
        """As of `ZoomViT`, under the threshold only: ValueError for keep_tokens and budget, and without scores."""
        return self._run_packed(self.tokenise(images, scores, alpha, keep_tokens, budget, prune))

    def tokenise(
        self,
        images: Tensor,
        scores: Tensor | None = None,
        alpha: float | None = None,
        keep_tokens: int | None = None,
        budget: int | str | None = None,
        prune: str = "backward",
    ) -> Tokens:
        """As of `ZoomViT`; the two zero vectors have id -1."""
        if scores is None or keep_tokens is not None or budget is not None:
            raise ValueError("the released ZoomViT works by threshold: give scores, and no keep_tokens or budget")
        alpha = self.alpha if alpha is None else alpha
        self._choose_for(images, scores, alpha, None, None, prune)  # checks the arguments
        cell_scores = zoom_tokens.coarse_scores(scores, self.zoom_factor)
        place_scores = zoom_tokens.fine_scores(scores, self.zoom_factor)
        fine_patches, fine_kernel, coarse_patches, coarse_kernel = zoom_tokens.patches_and_kernels(
            images, self.patch_embed.weight, self.zoom_factor
        )
        sequences, ids = [], []
        for b in range(len(images)):
            fine = (place_scores[b] > alpha).nonzero()[:, 0]
            coarse = (cell_scores[b] < alpha).nonzero()[:, 0]
            zero, bias = images.new_zeros(1, self.embed_dim), self.patch_embed.bias
            fine_tokens = (
                fine_patches[b, fine] @ fine_kernel.T + bias + self.pos_fine[0, fine] + 1
            )  # 1: fixed embedding
            coarse_tokens = coarse_patches[b, coarse] @ coarse_kernel.T + bias + self.pos_coarse[0, coarse]
            cls = (self.cls_token + self.pos_cls)[0]
            sequences.append(torch.cat([cls, fine_tokens, zero, coarse_tokens, zero]))
            gap, last = fine.new_tensor([-1]), fine.new_tensor([5 * self.coarse_grid**2])
            ids.append(torch.cat([last, fine, gap, coarse + self.pos_fine.shape[1], gap]))
        rising = sorted(range(len(images)), key=lambda b: len(ids[b]))
        return Tokens(
            tokens=torch.cat([sequences[b] for b in rising]),
            ids=torch.cat([ids[b] for b in rising]),
            lengths=tuple(len(ids[b]) for b in rising),
            index=torch.tensor(rising, device=images.device),
        )

    def token_counts(
        self,
        scores: Tensor,
        alpha: float | None = None,
        keep_tokens: int | None = None,
        budget: int | str | None = None,
        prune: str = "backward",
    ) -> Tensor:
        """As of `ZoomViT`, the two zero vectors included."""
        if keep_tokens is not None or budget is not None:
            raise ValueError("the released ZoomViT works by threshold: give no keep_tokens and no budget")
        alpha = self.alpha if alpha is None else zoom_tokens.check_alpha(alpha)
        fine = (zoom_tokens.fine_scores(scores, self.zoom_factor) > alpha).sum(1)
        return fine + (zoom_tokens.coarse_scores(scores, self.zoom_factor) < alpha).sum(1) + 2

    def macs(self, zoomed: int, keep_tokens: int | None = None) -> int:
        """Not known by the number of zoomed cells alone, so ValueError: places that no token covers make sequences shorter."""
        raise ValueError("what the released ZoomViT costs depends on the scores; count it by train.macs.count_macs")


default_cfgs = untrained_cfgs("zoomvit_released")


@register_model
def zoomvit_released(pretrained: bool = False, **kwargs: Any) -> ReleasedZoomViT:
    """`ReleasedZoomViT` as DeiT-III-S. Takes its arguments; alpha is .01 unless given."""
    defaults = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, "alpha": 0.01}
    return build(ReleasedZoomViT, "zoomvit_released", pretrained, defaults, kwargs)


# -- opening -----------------------------------------------------------------------------------------------------------


def load_release(source: str | Path | Mapping[str, Any], model: str = "zoomvit", **config: Any) -> Any:
    """Open a checkpoint that the authors of a model published.

    Args:
        source: a file that torch.save wrote, read without unpickling code, or a state dict. Either may be wrapped as
            {"model": state dict}, the names in it prefixed with "module.".
        model: whose checkpoint it is: "zoomvit", "cfvit", "lfvit" or "sparseformer" (v1).
        config: what the shapes of the weights can't tell. For zoomvit: num_heads, zoom_factor (2.0 or 0.5), alpha;
            for cfvit: num_heads; for lfvit: num_heads, region_size; for sparseformer: num_heads and focus_repeats, in
            all that were published 64 and 4.

    Returns:
        For zoomvit (ReleasedZoomViT, Zoomer), both in eval mode, the zoomer frozen: `vit(images, zoomer(images))`. For the
        others a CFViT, LFViT or SparseFormer in eval mode.

    Raises:
        ValueError: an unknown model, config missing or unknown, a file that is no checkpoint, keys missing from it or
            unknown in it, weights of unexpected shapes.
        OSError: the file can't be read.
    """
    if model not in _OPENERS:
        raise ValueError(f"model must be one of {', '.join(_OPENERS)}, got {model!r}")
    name, state = _state_dict(source)
    opener, wanted = _OPENERS[model]
    if set(config) != set(wanted):
        raise ValueError(f"{name}: give {', '.join(wanted)} by keyword; got {', '.join(sorted(config)) or 'none'}")
    return opener(name, state, **config)


def _state_dict(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """What to call the source in messages, and its tensors by name."""
    name, state = "state dict", source
    if not isinstance(source, Mapping):
        name = str(source)
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            told = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise ValueError(f"{name}: not a checkpoint of plain tensors ({told})") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{name}: holds no state dict; expected tensors by name, perhaps under 'model'")
    return name, {key.removeprefix("module."): value for key, value in state.items()}


def _open_zoomvit(
    name: str, state: dict[str, Tensor], num_heads: int, zoom_factor: float, alpha: float
) -> tuple[ReleasedZoomViT, Zoomer]:
    def shape(key: str) -> torch.Size:
        if key not in state:
            raise ValueError(f"{name}: has no {key}; expected a ZoomViT that its authors published")
        return state[key].shape

    width, chans, patch, _ = shape("patch_embed.proj.weight")
    hidden = shape("blocks.0.mlp.fc1.weight")[0]
    classes = shape("head.weight")[0]
    depth = 1 + max(int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key)))
    grid = int(shape(_ZOOMER + "project.bias")[0] ** 0.5)
    stages = 1 + max(int(found[1]) for key in state if (found := re.match(r".*\.features\.(\d+)\.\d+\.conv1", key))) - 4
    zoomer = Zoomer(2 * stages, grid, width=shape(_ZOOMER + "features.0.weight")[0], in_chans=chans)
    vit = timm.create_model(
        "zoomvit_released",
        img_size=grid * patch,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        num_classes=classes,
        in_chans=chans,
        mlp_ratio=hidden / width,
        zoom_factor=zoom_factor,
        alpha=alpha,
    )
    of_zoomer = {key.removeprefix(_ZOOMER): value for key, value in state.items() if key.startswith(_ZOOMER)}
    of_vit = {key: value for key, value in state.items() if not key.startswith(_ZOOMER)}
    _fill(zoomer, of_zoomer, _our_zoomer_name, name, _ZOOMER)
    _fill(vit, of_vit, _our_vit_name, name)
    return vit.eval(), zoomer.freeze()


def _open_two_stage(variant: str, name: str, state: dict[str, Tensor], num_heads: int, **config: Any) -> CFViT:
    def shape(key: str) -> torch.Size:
        if key not in state:
            raise ValueError(f"{name}: has no {key}; expected a {variant} that its authors published")
        return state[key].shape

    width, chans, patch, _ = shape("patch_embed.proj.weight")
    vit = timm.create_model(
        f"{variant}_small",
        img_size=math.isqrt(shape("pos_embed_list.1")[1] - 1) * patch,
        patch_size=patch,
        embed_dim=width,
        depth=1 + max((int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))), default=0),
        num_heads=num_heads,
        num_classes=shape("head.weight")[0],
        in_chans=chans,
        mlp_ratio=shape("blocks.0.mlp.fc1.weight")[0] / width,
        **config,
    )
    _fill(vit, state, _our_two_stage_name, name)
    return vit.eval()


_TWO_STAGE_NAMES = {
    "patch_embed.proj.": "patch_embed.",
    "pos_embed_list.0": "pos_coarse",
    "pos_embed_list.1": "pos_fine",
    "reuse_block.0.": "reuse.norm.",
    "reuse_block.1.": "reuse.mlp.",
}


def _our_two_stage_name(theirs: str) -> str:
    prefix = next((prefix for prefix in _TWO_STAGE_NAMES if theirs.startswith(prefix)), "")
    return _TWO_STAGE_NAMES.get(prefix, "") + theirs.removeprefix(prefix)


def _our_vit_name(theirs: str) -> str:
    ours = re.sub(r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma", theirs)
    return ours.replace("patch_embed.proj.", "patch_embed.")


def _our_zoomer_name(theirs: str) -> str:
    """features: conv, bn, relu, pool, then stages of two blocks; ours lists the blocks one after another."""
    if found := re.match(r"features\.(\d+)\.([01])\.(.*)", theirs):
        return f"trunk.{4 + 2 * (int(found[1]) - 4) + int(found[2])}.{found[3]}"
    return theirs.replace("features.", "trunk.").replace("new_fc.0.", "reduce.")


def _fill(
    model: nn.Module, state: dict[str, Tensor], rename: Callable[[str], str], name: str, prefix: str = ""
) -> None:
    """Copy every parameter of `model` from `state`; positions need not be there where they are computed."""
    target = model.state_dict()
    given = {rename(theirs): (prefix + theirs, value) for theirs, value in state.items()}
    computed = {key for key, _ in model.named_buffers() if key.startswith("pos_")}
    if unknown := sorted(set(given) - set(target)):
        raise ValueError(
            f"{name}: {given[unknown[0]][0]} is not known ({len(unknown)} such); another model's checkpoint?"
        )
    if missing := sorted(set(target) - set(given) - computed):
        raise ValueError(f"{name}: has nothing for {missing[0]} ({len(missing)} such); the checkpoint is not whole")
    for ours, (theirs, value) in given.items():
        if value.shape != target[ours].shape:
            raise ValueError(f"{name}: {theirs} is {list(value.shape)}, expected {list(target[ours].shape)}")
    model.load_state_dict({ours: value for ours, (_, value) in given.items()}, strict=False)


def _open_sparseformer(name: str, state: dict[str, Tensor], num_heads: int, focus_repeats: int) -> SparseFormer:
    renamed = {theirs: _our_sparseformer_name(theirs) for theirs in state}
    ours = {renamed[theirs]: value for theirs, value in state.items()}

    def shape(key: str) -> torch.Size:
        if key not in ours:
            raise ValueError(f"{name}: has nothing for {key}; expected a SparseFormer v1 that its authors published")
        return ours[key].shape

    focus_dim = shape("focus.qkv.weight")[1]
    model = timm.create_model(
        "sparseformer_tiny",
        conv_dim=shape("stem.weight")[0],
        num_tokens=shape("token_roi")[0],
        num_points=shape("focus.sampler.offset_bias")[0] // 2,
        focus_dim=focus_dim,
        cortex_dim=shape("bridge.0.weight")[0],
        focus_repeats=focus_repeats,
        cortex_depth=len({key.split(".")[1] for key in ours if key.startswith("cortex.")}),
        num_heads=num_heads,
        num_classes=shape("head.weight")[0],
        in_chans=shape("stem.weight")[1],
        mlp_ratio=shape("focus.fc1.weight")[0] / focus_dim,
    )
    _fill(model, state, renamed.__getitem__, name)
    return model.eval()


# Whole names, or parts of them. Two of the tensors were renamed between versions of their code.
_SPARSEFORMER = {
    "feat_extractor.conv1.": "stem.",
    "token_roi.weight": "token_roi",
    "initial_roi.weight": "token_roi",
    "token_embedding.weight": "token_embedding",
    "initial_embedding.weight": "token_embedding",
    "layers.0.": "focus.",
    "layers.1.": "bridge.",
    "head.norm.": "norm.",
    "head.classifier.": "head.",
    ".attn.in_proj_": ".qkv.",
    ".attn.out_proj.": ".proj.",
    ".ln_attn.": ".norm_attn.",
    ".ffn.0.": ".norm_mlp.",
    ".ffn.1.": ".fc1.",
    ".ffn.3.": ".fc2.",
    ".roi_adjust_module.0.": ".sampler.norm_adjust.",
    ".roi_adjust_module.1.": ".sampler.adjust.",
    ".roi_offset_module.0.": ".sampler.norm_offset.",
    ".roi_offset_module.1.": ".sampler.offset.",
    ".roi_offset_bias": ".sampler.offset_bias",
    ".adaptive_mixing.parameter_generator.0.": ".sampler.norm_mix.",
    ".adaptive_mixing.parameter_generator.1.": ".sampler.reduce.",
    ".adaptive_mixing.parameter_generator.2.": ".sampler.generate.",
    ".adaptive_mixing.m_beta": ".sampler.channel_bias",
    ".adaptive_mixing.s_beta": ".sampler.point_bias",
    ".adaptive_mixing.tuo_proj.": ".sampler.out.",
    ".adaptive_mixing.out_proj.": ".sampler.out.",
}


def _our_sparseformer_name(theirs: str) -> str:
    ours = theirs
    for part, replacement in _SPARSEFORMER.items():
        ours = ours.replace(part, replacement)
    return re.sub(r"^layers\.(\d+)\.", lambda found: f"cortex.{int(found[1]) - 2}.", ours)


_OPENERS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "zoomvit": (_open_zoomvit, ("num_heads", "zoom_factor", "alpha")),
    "cfvit": (partial(_open_two_stage, "cfvit"), ("num_heads",)),
    "lfvit": (partial(_open_two_stage, "lfvit"), ("num_heads", "region_size")),
    "sparseformer": (_open_sparseformer, ("num_heads", "focus_repeats")),
}
