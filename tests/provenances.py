"""A provenance of maps that no teacher made."""

from zpipe.schemas.manifest import Provenance

PROVENANCE = Provenance(
    teacher="deit_tiny_patch16_224",
    teacher_args={"img_size": [64, 96]},
    weights="teacher.pth",
    seed=None,
    teacher_digest="a" * 64,
    num_classes=5,
    method="transformer-attribution",
    start_layer=0,
    target="ground-truth",
    frame="full",
    grid=(4, 6),
    image_size=(64, 96),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    interpolation="bicubic",
    crop_pct=1.0,
    symmetrised=False,
    precision="float32",
)
