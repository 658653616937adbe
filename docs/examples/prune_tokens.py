"""Does a plain ViT keep its answer when it sees only the patches that the cached maps call relevant?

    python docs/examples/prune_tokens.py MAPS SHARDS MODEL

MODEL is a timm name (pretrained), or local-dir:FOLDER for a model on disk. No teacher runs: the maps are read.
"""

import sys

import timm
import torch

from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.transforms import ViewConfig

maps, shards, name = sys.argv[1:4]
model = timm.create_model(name, pretrained=True).eval()
side = model.patch_embed.img_size[0]
view = ViewConfig(crop_pct=model.pretrained_cfg["crop_pct"])
mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))


@torch.inference_mode()
def predict(images, keep):  # images [B, 3, H, W], keep [B, K] -> class [B]
    x = model._pos_embed(model.patch_embed(images))  # [B, 1 + N, D]
    kept = keep[..., None].expand(-1, -1, x.shape[-1]) + model.num_prefix_tokens
    x = torch.cat([x[:, : model.num_prefix_tokens], x.gather(1, kept)], dim=1)  # [B, 1 + K, D]
    return model.forward_head(model.norm(model.blocks(model.norm_pre(x)))).argmax(dim=1)


torch.manual_seed(0)
for share in (1.0, 0.5, 0.25, 0.1):
    right = {"relevant": 0, "random": 0}
    loader = RelevanceLoader(shards, maps, batch_size=64, image_size=side, augment="eval", missing="skip", view=view)
    for batch in loader:
        images = (batch["image"] / 255 - mean) / std
        scores = torch.nn.functional.interpolate(batch["relevance"][:, None], size=model.patch_embed.grid_size).flatten(
            1
        )
        for kind, order in (("relevant", scores), ("random", torch.rand_like(scores))):
            keep = order.topk(max(1, round(share * order.shape[1])), dim=1).indices
            right[kind] += (predict(images, keep) == batch["label"]).sum().item()
    print(
        f"{share:4.0%} of the patches: "
        + ", ".join(f"{kind} {n / loader.sample_count:.1%}" for kind, n in right.items())
    )
