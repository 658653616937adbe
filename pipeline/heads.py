"""Heads in place of a model's own: a linear probe of its features, and zero-shot classes that embeddings describe.

A `Classifier` calls its head with itself and the normalised tokens of its last block, or of any other number of tokens
as long as the prefix tokens lead. Heads use functions of torch alone, so that a function mode can correct their
backward pass (LibraGrad counts the norm of an embedding as a constant).

Symbols in the shape comments: B images, N tokens, D width, P numbers that the model's own head reads, F features of a
probe, E numbers of an embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from zpipe.pipeline.classifier import Classifier, Part
from zpipe.pipeline.teacher_spec import TeacherSpec
from zpipe.schemas.atomic import commit
from zpipe.schemas.errors import UsageError, ZpipeError, first_line
from zpipe.schemas.formats import Count, Digest, Format, Text, decode_json
from zpipe.schemas.names import printable
from zpipe.schemas.storage import open_file, storage_errors
from zpipe.schemas.weights import not_finite, read_tensors
from zpipe.schemas.weights_file import DIGEST, NO_DIGEST, check_digest, seal

RECORD = "zpipe_head"  # the name of the record among the metadata of a head's file
REFIT = "fit a head with zpipe fit-head"
CLIP_SCALE = 100.0  # what CLIP and its relatives learn, capped at this value (Radford et al., ICML 2021, Section 2.5)
NORM_TOLERANCE = 0.01  # rounding to float16 changes the norm of an embedding by less
NPY = b"\x93NUMPY"

PREPARATION_TOLERANCE = 1e-4  # descriptions round mean and standard deviation differently

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Channels = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class HeadRecord:
    """What the file of a fitted head says about it."""

    teacher: Text
    """Name of the teacher whose features it reads."""
    teacher_digest: Digest
    """`zpipe.pipeline.teacher.state_digest` of that teacher's weights, without any head in place of its own."""
    reads_mean: bool
    """Whether it reads the mean of the patch tokens beside what the teacher's own head reads."""
    classes: tuple[Text, ...]
    """Names of its classes; empty if only numbers are known."""
    frame: Text
    """What the teacher saw of an image: a name of `zpipe.pipeline.shard_reader.FRAMES`."""
    own_parts: tuple[Text, ...] = ()
    """`Classifier.own_parts` of the teacher, which say of two own heads which one answers; empty if not recorded."""
    mean: Channels | None = None
    """Mean of each channel, subtracted from pixels in 0 to 1; None if not recorded. So for the next three."""
    std: Channels | None = None
    """Standard deviation of each channel."""
    interpolation: Text | None = None
    """How images were resized."""
    crop_pct: float | None = None
    """Fraction of the image that the frame ``center`` showed."""
    count: Count
    """Number of images that it was fitted to."""
    strength: Annotated[float, msgspec.Meta(ge=0)]
    """Strength of the L2 penalty, see `zpipe.pipeline.fit_head.fit`."""
    held_out: Count
    """Number of images by which the strength was chosen; the final fit saw them, too."""
    held_out_top1: Share
    """Top-1 accuracy on these images of a fit without them, 0 to 1."""
    zpipe_version: Text
    """Version of zpipe that wrote the file."""


FORMAT = Format(name="zpipe-head", version=1, content=HeadRecord, what="a head", remedy=REFIT)


class LinearHead(nn.Module):
    """A linear probe: W f + b, where f is what the model's own head reads, followed by the mean of the patch tokens.

    Both are taken of normalised tokens.

    Args:
        weight: W, float [C, F].
        bias: b, float [C].
        own_parts: The parts that the model's own head reads.
        reads_mean: Whether f contains the mean of the patch tokens; without it F = P, else P + D.

    Attributes:
        parts: What it reads, for `Classifier.readout`.
        num_classes: C.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, own_parts: tuple[Part, ...], reads_mean: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.parts: tuple[Part, ...] = (*own_parts, "mean") if reads_mean else own_parts
        self.reads_mean = reads_mean
        self.num_classes = len(bias)

    @override
    def forward(self, classifier: Classifier, normed: Tensor) -> Tensor:
        """Classify by the normalised tokens [B, N, D] of a classifier; -> [B, C]."""
        return F.linear(probe_features(classifier, normed, self.reads_mean), self.weight, self.bias)


class ZeroShotHead(nn.Module):
    """Zero-shot classification: scale * cosine of the image's embedding and that of each class.

    The image's embedding is the answer of the model's own head: of timm's CLIP towers, the projection into the space
    that images and texts share; of a model without a head, what the head would read.

    Args:
        embeddings: Embeddings of the classes, float [C, E], of any norm but 0.
        scale: The factor of the cosine, which CLIP calls the exponential of `logit_scale`.

    Attributes:
        num_classes: C.
    """

    embeddings: Tensor
    scale: Tensor

    def __init__(self, embeddings: Tensor, scale: float = CLIP_SCALE) -> None:
        super().__init__()
        self.register_buffer("embeddings", F.normalize(embeddings.float(), dim=-1))
        self.register_buffer("scale", torch.tensor(scale))
        self.num_classes = len(embeddings)

    @override
    def forward(self, classifier: Classifier, normed: Tensor) -> Tensor:
        """Classify by the normalised tokens [B, N, D] of a classifier; -> [B, C]."""
        image = F.normalize(classifier.answer(classifier.pool(normed)), dim=-1)  # [B, E]
        return self.scale * F.linear(image, self.embeddings)


def reads_mean(classifier: Classifier) -> bool:
    """Whether a probe of this classifier shall read the mean of the patch tokens, too.

    It does unless the classifier's own head already reads all patches: by their mean, or by a pooling attention.
    """
    return all(part in ("class", "distilled") for part in classifier.parts)


def probe_features(classifier: Classifier, normed: Tensor, with_mean: bool) -> Tensor:
    """The features of a linear probe [B, F] of normalised tokens [B, N, D]; see `LinearHead`."""
    pooled = classifier.pool(normed)  # [B, P]
    if not with_mean:
        return pooled
    return torch.cat([pooled, normed[:, classifier.prefix_tokens :].mean(dim=1)], dim=1)


class OtherHead(NamedTuple):
    """A head in place of a model's own."""

    head: nn.Module | None = None
    """The head; None keeps the model's own."""
    classes: tuple[str, ...] = ()
    """Names of its classes; empty if nothing names them."""
    note: str = ""
    """What was assumed about it, for the user."""
    frame: str = ""
    """What the teacher saw of an image when the head was fitted; empty if it was not."""


def other_head(spec: TeacherSpec, classifier: Classifier, digest: str, prepared: Mapping[str, Any]) -> OtherHead:
    """Read the head that a request names in place of the model's own.

    Args:
        spec: The request; its `head` or its `class_embeddings` names a file, or neither does.
        classifier: The model with its own head, or none, on the CPU.
        digest: `zpipe.pipeline.teacher.state_digest` of the model's weights.
        prepared: How images are prepared: `mean`, `std`, `interpolation` and `crop_pct`.

    Raises:
        UsageError: There is no such file.
        ZpipeError: The file cannot be read, is not what it should be, or belongs to another teacher, or to images that
            are normalised differently.
    """
    if spec.head is not None:
        head, record = read_head(Path(spec.head), classifier, digest)
        note = _preparation_note(Path(spec.head), record, prepared)
        return OtherHead(head, record.classes, note, record.frame)
    if spec.class_embeddings is not None:
        return read_class_embeddings(Path(spec.class_embeddings), classifier)
    return OtherHead()


def write_head(path: Path, weight: Tensor, bias: Tensor, record: HeadRecord) -> None:
    """Write a fitted head: a safetensors file of its weight [C, F] and bias [C], with the record and a digest."""
    about = msgspec.json.encode(FORMAT.header | asdict(record)).decode()
    tensors = {name: value.float().cpu().contiguous() for name, value in (("weight", weight), ("bias", bias))}
    with commit(path) as tmp:
        tmp.write_bytes(safetensors.torch.save(tensors, metadata={DIGEST: NO_DIGEST, RECORD: about}))
        seal(tmp)


def read_head(path: Path, classifier: Classifier, digest: str) -> tuple[LinearHead, HeadRecord]:
    """Read a fitted head for a classifier.

    Args:
        path: The file, a path on this machine.
        classifier: The model with its own head, or none.
        digest: Digest of the model's weights.

    Raises:
        UsageError: There is no such file.
        ZpipeError: It is damaged, no head, of a newer version, or was fitted to another teacher or own head.
    """
    _check_is_there(path, "head")
    check_digest(path, REFIT)
    metadata = _metadata(path)
    if RECORD not in metadata:
        raise ZpipeError(f"{path}: is no head that zpipe fit-head wrote; for embeddings of classes give them as such")
    record = FORMAT.decode(metadata[RECORD].encode(), path)
    if record.teacher_digest != digest:
        raise ZpipeError(
            f"{path}: was fitted to {printable(record.teacher)[:80]} with digest {record.teacher_digest[:12]}, these "
            f"weights have {digest[:12]}; give that teacher, or {REFIT}"
        )
    if record.own_parts not in ((), classifier.own_parts):
        raise ZpipeError(
            f"{path}: reads {' and '.join(record.own_parts)} of the teacher, not {' and '.join(classifier.own_parts)}; "
            f"give --own-head as it was fitted with, or {REFIT}"
        )
    tensors = safetensors.torch.load_file(path)
    wanted = _features(classifier, record.reads_mean)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or bias is None or weight.dtype != torch.float32 or bias.dtype != torch.float32:
        raise ZpipeError(f"{path}: holds no float32 weight and bias; {REFIT}")
    if weight.ndim != 2 or not len(weight) or bias.shape != weight.shape[:1]:
        raise ZpipeError(f"{path}: weight {list(weight.shape)} and bias {list(bias.shape)} make no head; {REFIT}")
    if weight.shape[1] != wanted:
        raise ZpipeError(f"{path}: reads {weight.shape[1]} features, this teacher has {wanted}; {REFIT}")
    if record.classes and len(record.classes) != len(weight):
        raise ZpipeError(f"{path}: names {len(record.classes)} classes and has {len(weight)}; {REFIT}")
    if bad := not_finite(tensors):
        raise ZpipeError(f"{path}: {bad} holds NaN or infinity; {REFIT}")
    return LinearHead(weight, bias, own_parts=classifier.parts, reads_mean=record.reads_mean), record


def _preparation_note(path: Path, record: HeadRecord, prepared: Mapping[str, Any]) -> str:
    """What differs between the images that a head was fitted to and those of a request; empty if nothing does.

    Raises:
        ZpipeError: They are normalised differently, so that the features are others.
    """
    for name in ("mean", "std"):
        fitted = getattr(record, name)
        if fitted is not None and not np.allclose(fitted, prepared[name], rtol=0, atol=PREPARATION_TOLERANCE):
            raise ZpipeError(
                f"{path}: was fitted to images of the {name} {list(fitted)}, these have {list(prepared[name])}; give "
                f"--{name} {','.join(map(str, fitted))}, or {REFIT}"
            )
    if record.interpolation not in (None, prepared["interpolation"]):
        return f"{path}: was fitted to {record.interpolation} images, these are {prepared['interpolation']}"
    return ""


@torch.no_grad()
def _features(classifier: Classifier, with_mean: bool) -> int:
    """F, the number of features of a probe."""
    return probe_features(classifier, _no_tokens(classifier), with_mean).shape[1]


@torch.no_grad()
def _embedding_width(classifier: Classifier) -> int:
    """E, the number of values in the embedding of an image."""
    return classifier.answer(classifier.pool(_no_tokens(classifier))).shape[1]


def _no_tokens(classifier: Classifier) -> Tensor:
    weight = next(classifier.model.parameters())
    return torch.zeros(1, classifier.tokens, classifier.width, dtype=weight.dtype, device=weight.device)


def read_class_embeddings(path: Path, classifier: Classifier) -> OtherHead:
    """Read embeddings of classes [C, E] as a zero-shot head for a classifier.

    The file is one of NumPy (.npy), safetensors, or what torch.save writes: one array of floating-point numbers, a row
    per class, named `embeddings` if there are others. The metadata of a safetensors file may hold `classes`, a JSON
    list of names, and `logit_scale`, the factor of the cosine. Names may also be in a text file of the same name with
    the suffix .txt, one a line.

    Args:
        path: The file, a path on this machine.
        classifier: The model whose images are compared with the embeddings.

    Raises:
        UsageError: There is no such file.
        ZpipeError: It cannot be read, is no such array, does not fit the model, or a row is zero or not finite.
    """
    _check_is_there(path, "embeddings of classes")
    embeddings, metadata = _read_embeddings(path)
    _check_embeddings(path, embeddings, _embedding_width(classifier))
    notes = []
    if "logit_scale" in metadata:
        scale = _scale(path, metadata["logit_scale"])
    else:
        scale = CLIP_SCALE
        notes.append(f"names no logit_scale, that of CLIP is assumed: {scale:g}")
    norms = embeddings.norm(dim=1)
    if (norms - 1).abs().max() > NORM_TOLERANCE:
        notes.append(f"rows have norms of {norms.min():.3g} to {norms.max():.3g} and were normalised")
    note = f"{path}: {'; '.join(notes)}" if notes else ""
    return OtherHead(ZeroShotHead(embeddings, scale), _class_names(path, metadata, len(embeddings)), note)


def _read_embeddings(path: Path) -> tuple[Tensor, dict[str, str]]:
    """The embeddings, and the metadata beside them."""
    with open_file(path) as file:
        head = file.read(9)
    if head.startswith(NPY):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            found = {"": torch.from_numpy(np.array(array, np.float32))} if array.dtype.kind == "f" else {}
        except (ValueError, OSError, EOFError) as error:
            raise ZpipeError(f"{path}: cannot be read as an array ({first_line(error)}); save it again") from error
    else:
        found = {name: value for name, value in read_tensors(path).items() if value.is_floating_point()}
    metadata = _metadata(path) if head[8:9] == b"{" else {}
    if "embeddings" not in found and len(found) != 1:
        names = ", ".join(printable(name)[:40] for name in list(found)[:3])
        raise ZpipeError(
            f"{path}: holds {len(found)} arrays of floating-point numbers{f' ({names}, ...)' if names else ''}; give "
            "one, or name it 'embeddings'"
        )
    return found.get("embeddings", next(iter(found.values()))).float(), metadata


def _check_embeddings(path: Path, embeddings: Tensor, width: int) -> None:
    shape = list(embeddings.shape)
    if embeddings.ndim != 2 or not embeddings.numel():
        raise ZpipeError(f"{path}: embeddings are {shape}; give a row per class: [classes, {width}]")
    if shape[1] != width:
        turned = "; it has a column per class: transpose it" if shape[0] == width else ""
        raise ZpipeError(
            f"{path}: embeddings are {shape}, images of this teacher have {width} numbers"
            f"{turned or '; give those of the text tower that belongs to it'}"
        )
    bad = ~embeddings.isfinite().all(dim=1)
    if bad.any():
        raise ZpipeError(f"{path}: row {int(bad.nonzero()[0])} holds NaN or infinity; compute it again")
    zero = ~embeddings.any(dim=1)
    if zero.any():
        raise ZpipeError(f"{path}: row {int(zero.nonzero()[0])} is zero, which has no direction; compute it again")


def _scale(path: Path, text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < 1e4:
        raise ZpipeError(f"{path}: logit_scale {printable(text)[:40]!r}; give a number > 0, the factor of the cosine")
    return scale


def _class_names(path: Path, metadata: Mapping[str, str], count: int) -> tuple[str, ...]:
    beside = path.with_suffix(".txt")
    if "classes" in metadata:
        remedy = "write them as a JSON list of texts"
        names = decode_json(metadata["classes"], path, type=tuple[Text, ...], what="names of classes", remedy=remedy)
        where = path
    elif beside.is_file():
        with _read_errors(beside, "names of classes"), open_file(beside) as file:
            names, where = tuple(line.strip() for line in file.read().decode().splitlines()), beside
    else:
        return ()
    if len(names) != count:
        raise ZpipeError(f"{where}: names {len(names)} classes, {path.name} has {count} rows; give a name per row")
    return names


def _metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file."""
    try:
        with safetensors.safe_open(path, "pt") as opened:
            return opened.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ZpipeError(f"{path}: is truncated or damaged ({first_line(error)}); write it again") from error


def _check_is_there(path: Path, what: str) -> None:
    if not path.exists():
        raise UsageError(f"{path}: no such {what}; check the path")
    with _read_errors(path, what), open_file(path):
        pass


@contextmanager
def _read_errors(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except storage_errors(UnicodeDecodeError) as error:
        raise ZpipeError(f"{path}: {what} cannot be read ({first_line(error)}); give another file") from error
