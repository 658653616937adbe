"""The models. Importing this package registers them with timm, so that `timm.create_model` finds them by name."""

from zpipe.train.models.cfvit import CFViT
from zpipe.train.models.fusion import FusedViT
from zpipe.train.models.image_zoom import ImageZoom
from zpipe.train.models.lfvit import LFViT
from zpipe.train.models.lvvit import LVViT
from zpipe.train.models.release import load_release
from zpipe.train.models.sparseformer import SparseFormer
from zpipe.train.models.token_pruned_vit import TokenPrunedViT
from zpipe.train.models.tome import ToMeViT
from zpipe.train.models.warm_start import load_vit
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.models.zoomvit import ZoomViT

__all__ = [
    "CFViT",
    "FusedViT",
    "ImageZoom",
    "LFViT",
    "LVViT",
    "SparseFormer",
    "ToMeViT",
    "TokenPrunedViT",
    "ZoomViT",
    "Zoomer",
    "load_release",
    "load_vit",
]
