"""What `zpipe doctor --gpu` might measure on three kinds of GPU. The figures are made up."""

from zpipe.gpu_numbers import Agreement
from zpipe.gpu_rates import PRODUCTS, Rate, Rates
from zpipe.pipeline.explainer import precisions_of

NAMES = precisions_of("transformer-attribution")
WORST = {"float64": 1.0, "float64+float32": 1.0, "float64+bfloat16": 0.998, "float32+bfloat16": 0.89, "float32": 0.9}
AGREEMENT = [
    Agreement(
        method="transformer-attribution",
        precision=name,
        median=0.9997 if name.endswith(("+bfloat16", "+tf32")) else 1.0,
        worst=WORST.get(name, 0.88),
    )
    for name in NAMES
]


def rates_of(*, matmul, maps, training, decode, image_mb=80):
    """Made-up rates of a card; the maps are those of `NAMES`, in this order."""
    ((precision, speed),) = training.items()
    return Rates(
        matmul_tflops=dict(zip(PRODUCTS, matmul, strict=True)),
        copy_gb_per_s={"pageable": 10, "pinned": 50, "device": 2000},
        decode_images_per_s={"one_core": 580, "all_cores": decode},
        maps={
            name: Rate(images_per_s=speed, batch_size=64, image_bytes=image_mb * 10**6)
            for name, speed in zip(NAMES, maps, strict=True)
        },
        training={precision: Rate(images_per_s=speed, batch_size=128, image_bytes=50 * 10**6)},
    )


#                 float32, float64, +float32, +bfloat16, float32+bfloat16, float32+tf32
H200 = rates_of(
    matmul=(55, 52, 350, 650, 650), maps=(250, 240, 250, 820, 880, 510), training={"bf16": 5000}, decode=9000
)
RTX_4090 = rates_of(
    matmul=(1.2, 70, 140, 150, 150), maps=(260, 7, 20, 18, 600, 400), training={"bf16": 2000}, decode=9000
)
T4 = rates_of(
    matmul=(0.2, 7, 7, 3, 50), maps=(35, 1.5, 4, 4, 30, 35), training={"fp16": 500}, decode=2200, image_mb=200
)
GIB = 1 << 30
