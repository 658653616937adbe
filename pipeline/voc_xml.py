"""Reads annotations in the XML of Pascal VOC, in which ImageNet's boxes are published too, within bounds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.names import printable

MAX_XML_BYTES = 1 << 20
MAX_PIXEL = 1 << 31


class VocObject(NamedTuple):
    """An object of a VOC annotation."""

    name: str
    """Its class."""
    box: tuple[float, float, float, float]
    """xmin, ymin, xmax, ymax, as the file has them: in VOC's own files, pixels counted from 1, the last one inside."""
    difficult: bool
    """Whether the annotators found it hard to recognise."""


def read_voc_xml(data: bytes, where: str) -> tuple[tuple[int, int] | None, list[VocObject]]:
    """Read the size of the image and the objects from an annotation in VOC's XML. The parts of objects are left out.

    Args:
        data: The file.
        where: The file, for messages.

    Returns:
        Width and height in pixels, None if the file states none; and the objects in their order.

    Raises:
        ZpipeError: It is larger than `MAX_XML_BYTES`, no XML, or no annotation, or it declares a document type, whose
            entities may grow without bounds.
    """
    root = _parse_xml(data, where)
    if root.tag != "annotation":
        raise _no_voc(where, f"its root is not <annotation> but <{printable(root.tag[:60])}>")
    size = root.find("size")
    width, height = (0, 0) if size is None else (int(_number(size, name, where)) for name in ("width", "height"))
    objects: list[VocObject] = []
    for item in root.findall("object"):
        name = (item.findtext("name") or "").strip()
        bounds = item.find("bndbox")
        if not name or bounds is None:
            raise _no_voc(where, f"object {len(objects)} has no {'bndbox' if name else 'name'}")
        xmin, ymin, xmax, ymax = (_number(bounds, edge, where) for edge in ("xmin", "ymin", "xmax", "ymax"))
        difficult = (item.findtext("difficult") or "0").strip() not in ("", "0")
        objects.append(VocObject(name, (xmin, ymin, xmax, ymax), difficult))
    return ((width, height) if width > 0 and height > 0 else None), objects


def _parse_xml(data: bytes, where: str) -> Element:
    if len(data) > MAX_XML_BYTES:
        raise _no_voc(where, f"it has more than {MAX_XML_BYTES} bytes")

    def refuse(*_: Any) -> None:
        raise _no_voc(where, "it declares a document type, which may hold entities")

    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    try:
        parser.Parse(data, True)
    # The last two are what a declaration of an unknown encoding, or of one with several bytes a letter, raises.
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise _no_voc(where, str(error).split("\n")[0]) from error
    return builder.close()


def _number(parent: Element, name: str, where: str) -> float:
    text = (parent.findtext(name) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < MAX_PIXEL:
        raise _no_voc(where, f"its {parent.tag} has no number {name}, but {text[:60]!r}")
    return value


def _no_voc(where: str, reason: str) -> ZpipeError:
    return ZpipeError(f"{where}: not readable as XML in VOC's layout ({reason}); fetch it again")
