"""ImageNet in each of its published packagings, small: the same layout and file names, and few images.

All are made of `{wnid: [image file, ...]}` and, where they hold boxes, `{key: [(wnid, x1, y1, x2, y2), ...]}`.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.io import savemat
from tiny import write_tar

from zpipe.pipeline.imagenet_names import synsets

Images = Mapping[str, Sequence[bytes]]
Boxes = Mapping[str, Sequence[tuple[str, int, int, int, int]]]
Split = Literal["train", "val", "test"]
KIT = "ILSVRC2012_devkit_t12"
VAL = 50_000


def published(images: Images, split: Split) -> Iterator[tuple[str, str, bytes]]:
    """Key, wnid and bytes of each image. Those of val and test are numbered from 1, class after class in turn."""
    rows = [(wnid, number, data) for wnid, files in images.items() for number, data in enumerate(files)]
    if split == "train":
        yield from ((f"{wnid}_{10026 - 7 * number}", wnid, data) for wnid, number, data in rows)
        return
    for number, (wnid, _, data) in enumerate(sorted(rows, key=lambda row: row[1]), 1):
        yield f"ILSVRC2012_{split}_{number:08d}", wnid, data


def tar_of(members: Mapping[str, bytes], mode: Literal["w", "w:gz"] = "w") -> bytes:
    """A tar of plain files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def official(root: Path, images: Images, split: Split, boxes: Boxes | None = None) -> Path:
    """`ILSVRC2012_img_*.tar`, with the development kit for the val split, and with the archive of boxes if given."""
    root.mkdir(parents=True, exist_ok=True)
    rows = list(published(images, split))
    files = {f"{key}.JPEG": data for key, _, data in rows}
    if split == "train":
        wnids = dict.fromkeys(wnid for _, wnid, _ in rows)
        classes = {f"{wnid}.tar": {f"{key}.JPEG": data for key, of, data in rows if of == wnid} for wnid in wnids}
        write_tar(root / "ILSVRC2012_img_train.tar", {name: tar_of(members) for name, members in classes.items()})
    elif split == "val":
        write_tar(root / "ILSVRC2012_img_val.tar", files)
        write_tar(root / f"{KIT}.tar.gz", devkit([wnid for _, wnid, _ in rows]), "w:gz")
    else:
        members = {f"test/{name}": data for name, data in files.items()}
        write_tar(root / "ILSVRC2012_img_test_v10102019.tar", members)
    if boxes is not None:
        archive = {"train": "ILSVRC2012_bbox_train_v2.tar.gz", "val": "ILSVRC2012_bbox_val_v3.tgz"}[split]
        write_tar(root / archive, {name: xml(found) for name, found in annotations(boxes, split).items()}, "w:gz")
    return root


def devkit(wnids: Sequence[str]) -> dict[str, bytes]:
    """The files of the development kit for val images of these classes; the lines after them are 1."""
    number_of = {synset.wnid: synset.ilsvrc2012_id for synset in synsets()}
    lines = [number_of[wnid] for wnid in wnids] + [1] * (VAL - len(wnids))
    truth = "".join(f"{line}\n" for line in lines).encode()
    return {
        f"{KIT}/readme.txt": b"ILSVRC2012",
        f"{KIT}/data/meta.mat": meta_mat(),
        f"{KIT}/data/ILSVRC2012_validation_ground_truth.txt": truth,
    }


@cache
def meta_mat() -> bytes:
    """`meta.mat`: the 1,000 classes in the order of the kit, then synsets above them."""
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    rows = np.empty((1003, 1), [(name, object) for name in (*names, "num_train_images")])
    for synset in synsets():
        values = (synset.ilsvrc2012_id, synset.wnid, synset.name, "a text", 0, np.zeros((1, 0)), 0, 1300)
        rows[synset.ilsvrc2012_id - 1, 0] = tuple(float(v) if isinstance(v, int) else v for v in values)
    for number in (1001, 1002, 1003):
        children = np.array([[1.0, 2.0]])
        rows[number - 1, 0] = (float(number), f"n0000{number}", "entity", "a text", 2.0, children, 1.0, 0.0)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": rows}, do_compression=True)
    return buffer.getvalue()


def annotations(boxes: Boxes, split: Split) -> dict[str, Sequence[tuple[str, int, int, int, int]]]:
    """Paths of the XML files: in class folders for the training split, in `val/` for the other."""
    return {f"{key.partition('_')[0] if split == 'train' else 'val'}/{key}.xml": found for key, found in boxes.items()}


def xml(boxes: Sequence[tuple[str, int, int, int, int]]) -> bytes:
    """An XML file of boxes."""
    objects = "".join(
        f"<object>\n\t\t<name>{name}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>\n\t</object>\n"
        for name, x1, y1, x2, y2 in boxes
    )
    size = "<size><width>500</width><height>375</height><depth>3</depth></size>"
    return f"<annotation>\n\t<folder>x</folder>\n\t{size}\n\t{objects}</annotation>\n".encode()


def kaggle(root: Path, images: Images, split: Split, boxes: Boxes | None = None, *, as_xml: bool = False) -> Path:
    """Kaggle's tree with its CSV files, or with the XML files in place of that of the boxes."""
    data = root / "ILSVRC" / "Data" / "CLS-LOC" / split
    rows = list(published(images, split))
    for key, wnid, image in rows:
        path = data / (f"{wnid}/{key}.JPEG" if split == "train" else f"{key}.JPEG")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    words = "".join(f"{synset.wnid} {synset.name}\n" for synset in synsets())
    (root / "LOC_synset_mapping.txt").write_text(words)
    if boxes is not None and as_xml:
        for name, found in annotations(boxes, split).items():
            path = root / "ILSVRC" / "Annotations" / "CLS-LOC" / ("train" if split == "train" else "") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(xml(found))
    elif boxes is not None:
        lines = [f"{key},{''.join(f'{name} {a} {b} {c} {d} ' for name, a, b, c, d in boxes[key])}" for key in boxes]
        (root / f"LOC_{split}_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines, ""]))
    return root


def image_folder(root: Path, images: Images, split: Split) -> Path:
    """An unpacked tree with a folder per class; flat for the test split."""
    for key, wnid, data in published(images, split):
        path = root / split / ("" if split == "test" else wnid) / f"{key}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def hugging_face(root: Path, images: Images, split: Split) -> Path:
    """Parquet files as of `ILSVRC/imagenet-1k`: two, in row groups of two rows."""
    label_of = {synset.wnid: label for label, synset in enumerate(synsets())}
    names = [synset.name for synset in synsets()]
    names[517] = "crane2"  # names of a ClassLabel are unique
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    schema = pa.schema(
        {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()},
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [
        {
            "image": {"bytes": data, "path": f"{key}.JPEG" if split == "test" else f"{key}_{wnid}.JPEG"},
            "label": -1 if split == "test" else label_of[wnid],
        }
        for key, wnid, data in published(images, split)
    ]
    (root / "data").mkdir(parents=True, exist_ok=True)
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        stem = {"train": "train", "val": "validation", "test": "test"}[split]
        path = root / "data" / f"{stem}-{number:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema), path, row_group_size=2)
    return root


def web_dataset(root: Path, images: Images, split: Split) -> Path:
    """Tars as of `timm/imagenet-1k-wds`: jpg, cls and json under numbers."""
    label_of = {synset.wnid: label for label, synset in enumerate(synsets())}
    members: dict[str, bytes] = {}
    for number, (key, wnid, data) in enumerate(published(images, split)):
        meta = {"filename": f"{key}.JPEG", "label": label_of[wnid], "class_name": wnid}
        members |= {f"{number:08d}.cls": str(label_of[wnid]).encode(), f"{number:08d}.jpg": data}
        members[f"{number:08d}.json"] = json.dumps(meta).encode()
    write_tar(root / f"imagenet1k-{split}-0000.tar", members)
    return root


def unpack_devkit(root: Path) -> Path:
    """Replace the archive of the development kit by its folder."""
    with tarfile.open(root / f"{KIT}.tar.gz") as tar:
        tar.extractall(root, filter="data")
    (root / f"{KIT}.tar.gz").unlink()
    shutil.copy(root / KIT / "readme.txt", root / KIT / "COPYING")
    return root
