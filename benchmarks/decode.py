"""Compare JPEG decoders, from file to a random resized crop of 224 pixels, on one thread.

    python benchmarks/decode.py FOLDER

The decoders are PIL as it is installed, simplejpeg (if it is installed) and torchvision.io. FOLDER holds JPEGs; 200 of
them are read. All decoders crop and resize with PIL, so that only decoding differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import statistics
import time
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from zpipe.train.data.transforms import View, ViewConfig, decode, draw_view, view_image

SIZE = 224


def by_pil(data: bytes, view: View) -> None:
    image, _, source = decode(data, lambda _: view, SIZE)
    view_image(image, view, SIZE, source)


def by_simplejpeg(data: bytes, view: View) -> None:
    import simplejpeg

    image = Image.fromarray(simplejpeg.decode_jpeg(data))
    view_image(image, view, SIZE, image.size)


def by_torchvision(data: bytes, view: View) -> None:
    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    view_image(image, view, SIZE, image.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, work = np.random.default_rng(0), []
    for path in sorted(args.folder.rglob("*.[jJ][pP]*[gG]")):
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG" and image.mode == "RGB":
                work.append((data, draw_view(rng, *image.size, ViewConfig())))
        if len(work) == 200:
            break
    ways = {f"PIL {PIL.__version__}": by_pil, "torchvision.io": by_torchvision}
    if importlib.util.find_spec("simplejpeg"):
        ways["simplejpeg"] = by_simplejpeg
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            for data, view in work:
                way(data, view)
            rates[name].append(len(work) / (time.perf_counter() - begun))
    for name, values in rates.items():
        print(f"{name:20s} {statistics.median(values):6.0f} images/s [{min(values):.0f}, {max(values):.0f}]")


if __name__ == "__main__":
    main()
