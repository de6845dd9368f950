"""What is in a folder of shards as one HTML page that needs nothing else: pictures, histograms, tables."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from PIL import Image, ImageDraw

from data_tools.inspecting import inspect_shards, inspection_text
from framework.data.datasets import class_names
from framework.data.image import decode_image
from framework.data.manifest import Manifest, SampleInfo
from framework.data.shards import ShardReader
from framework.data.video import Undecodable, VideoRequest, decode_video
from framework.errors import CorruptSample
from framework.files import replace_text

__all__ = ["figure_of", "grid_of", "strip_of", "write_html", "write_page"]

_SIDE = 112  # pixels of a picture
_WIDE = 1320  # pixels that a sheet of pictures is wide at most, where one strip is not wider
_TITLE = 240  # pixels that the title of a smaller picture may have
_CAPTION, _GAP = 16, 8  # pixels above a picture, and beside it
_FRAMES = 4  # of a video, side by side
_SHEET = 48  # samples on a contact sheet
_CLASSES = 40  # bars of the classes
_BINS = 24

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;
color:#1b1f24;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.15rem;margin-top:2rem;border-top:1px solid #d5dae0;padding-top:1rem}
pre{background:#f4f6f8;padding:.8rem;overflow-x:auto}.charts{display:flex;flex-wrap:wrap;gap:1.2rem}
figure{margin:0}figcaption{font-size:12px;color:#4b5563}.sheet{display:flex;flex-wrap:wrap;gap:.5rem}
.sheet figure{width:min-content}.sheet img{display:block;background:#e5e7eb}
.sheet figcaption{overflow-wrap:anywhere;max-width:100%}.bad{color:#a40e26}
svg text{font:11px system-ui,sans-serif;fill:#1b1f24}
"""


def write_page(folder: str, target: Path) -> None:
    """Write the page; samples of the contact sheets are spread evenly over each data set.

    A sample that cannot be decoded shows its reason instead of a picture. Raises DataError for the folder.
    """
    manifest = Manifest.open(folder)
    summary = inspect_shards(folder)
    parts = [f"<pre>{html.escape(inspection_text(summary))}</pre>"]
    for number, described in enumerate(summary["datasets"]):
        chosen = numpy.flatnonzero(manifest.column("dataset") == number)
        parts.append(f"<h2>{html.escape(described['name'])}</h2>")
        parts.append(f'<div class="charts">{"".join(_charts(manifest, described, chosen))}</div>')
        parts.append(f'<h3>Samples</h3><div class="sheet">{"".join(_sheet(manifest, chosen))}</div>')
    write_html(target, str(manifest.folder), "".join(parts))


def write_html(target: Path, title: str, body: str) -> None:
    """Write a page that needs no other file; `body` is HTML, under a heading that is the title."""
    title = html.escape(title)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(
        target,
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>{body}</html>",
    )


def figure_of(title: str, strip: Image.Image) -> str:
    """A picture with its title below, for a `<div class="sheet">`."""
    title = html.escape(title)
    size = f'width="{strip.width}" height="{strip.height}"'
    image = f'<img {size} alt="{title}" src="{_data_address(strip)}">'
    return f"<figure>{image}<figcaption>{title}</figcaption></figure>"


def _charts(manifest: Manifest, described: Mapping[str, Any], chosen: numpy.ndarray) -> Iterator[str]:
    """Histograms of what matters for this kind, and bars of the classes."""
    values = {
        "short side, pixels": numpy.minimum(
            manifest.column("width")[chosen], manifest.column("height")[chosen]
        ),
        "size, kB": manifest.column("length")[chosen] / 1e3,
    }
    if described["kind"] == "video":
        frames, fps = manifest.column("frames")[chosen], manifest.column("fps")[chosen]
        values |= {"duration, s": frames / numpy.where(fps > 0, fps, numpy.inf), "rate, frames/s": fps}
    for title, column in values.items():
        yield _histogram(title, numpy.asarray(column, numpy.float64))
    for head, classes in {"classes": described["classes"], **described.get("heads", {})}.items():
        if classes:
            yield _class_bars(head, classes)


def _histogram(title: str, values: numpy.ndarray) -> str:
    """A histogram as SVG."""
    if not len(values):
        return ""
    low, high = float(values.min()), float(values.max())
    counts, edges = numpy.histogram(values, bins=_BINS if high > low else 1)
    width, height = 300, 110
    step, tallest = width / len(counts), max(1, int(counts.max()))
    bars = "".join(
        f'<rect x="{place * step:.1f}" y="{height - count / tallest * height:.1f}" width="{step - 1:.1f}" '
        f'height="{count / tallest * height:.1f}" fill="#3b6ea8">'
        f"<title>{edges[place]:.4g} to {edges[place + 1]:.4g}: {count}</title></rect>"
        for place, count in enumerate(counts.tolist())
    )
    return (
        f'<figure><svg width="{width}" height="{height + 18}" role="img" '
        f'aria-label="{html.escape(title)}">{bars}'
        f'<text x="0" y="{height + 14}">{low:.4g}</text>'
        f'<text x="{width}" y="{height + 14}" text-anchor="end">{high:.4g}</text></svg>'
        f"<figcaption>{html.escape(title)}; the tallest bar: {tallest}</figcaption></figure>"
    )


def _class_bars(title: str, classes: Mapping[str, int]) -> str:
    """Bars of the largest classes, then of the smallest if there are too many for one chart."""
    ranked = sorted(classes.items(), key=lambda item: (-item[1], item[0]))
    shown = ranked if len(ranked) <= _CLASSES else [*ranked[: _CLASSES // 2], *ranked[-_CLASSES // 2 :]]
    tallest = max(1, ranked[0][1])
    rows = "".join(
        f'<text x="190" y="{15 * row + 11}" text-anchor="end">{html.escape(_short(name))}</text>'
        f'<rect x="196" y="{15 * row + 2}" width="{count / tallest * 190:.1f}" height="11" fill="#4d8a5b"/>'
        f'<text x="{200 + count / tallest * 190:.1f}" y="{15 * row + 11}">{count}</text>'
        for row, (name, count) in enumerate(shown)
    )
    which = (
        "all" if len(shown) == len(ranked) else f"the {_CLASSES // 2} largest and smallest of {len(ranked)}"
    )
    return (
        f'<figure><svg width="450" height="{15 * len(shown) + 4}">{rows}</svg>'
        f"<figcaption>{html.escape(title)}: {which}</figcaption></figure>"
    )


def _short(text: str) -> str:
    return text if len(text) <= 28 else f"{text[:27]}…"


def _sheet(manifest: Manifest, chosen: numpy.ndarray) -> Iterator[str]:
    """Pictures of samples that are spread evenly over the data set."""
    if not len(chosen):
        return
    reader = ShardReader(manifest.folder, "inspect", remote=manifest.remote)
    places = numpy.unique(numpy.linspace(0, len(chosen) - 1, min(_SHEET, len(chosen))).round().astype(int))
    for place in chosen[places].tolist():
        sample = manifest.sample(place)
        chosen_classes = sample.targets or ((sample.label,) if sample.label >= 0 else ())
        names = class_names(manifest.dataset(sample.dataset), chosen_classes)
        title = " ".join([sample.key, ", ".join(names)])
        try:
            yield figure_of(title, picture_of(reader, sample))
        except (CorruptSample, Undecodable) as error:
            problem = f'<p class="bad">{html.escape(str(error))}</p>'
            yield f"<figure>{problem}<figcaption>{html.escape(title)}</figcaption></figure>"


def picture_of(reader: ShardReader, sample: SampleInfo) -> Image.Image:
    """A small picture of an image, or some frames of a video side by side."""
    data = reader.verify(sample, reader.read(sample))
    if sample.kind == "image":
        return strip_of(decode_image(data)[None])
    wanted = sorted({int(place) for place in numpy.linspace(0, sample.frames - 1, _FRAMES).round()})
    keys = sample.keyframes.tolist()
    request = VideoRequest(wanted, sample.frames, sample.height, sample.width, keys)
    return strip_of(numpy.concatenate([chunk for _, chunk in decode_video(data, request)]))


def strip_of(frames: numpy.ndarray, side: int = _SIDE) -> Image.Image:
    """Frames (n, height, width, 3) side by side, each `side` pixels high."""
    height, width = frames.shape[1:3]
    size = (max(1, round(width * side / height)), side)
    strip = Image.new("RGB", ((size[0] + 2) * len(frames) - 2, side), "white")
    for place, frame in enumerate(frames):
        strip.paste(Image.fromarray(numpy.ascontiguousarray(frame)).resize(size), (place * (size[0] + 2), 0))
    return strip


def grid_of(strips: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Strips under their titles, in lines like the words of a text: as many side by side as fit."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    placed, left, top, bottom = [], 0, 0, 0
    for title, strip in strips:
        width = max(strip.width, min(math.ceil(draw.textlength(title)) + 2, _TITLE))
        if left and left + width > _WIDE:
            left, top = 0, bottom
        placed.append((left, top, _fitting(title, draw, width - 2), strip))
        left += width + _GAP
        bottom = max(bottom, top + _CAPTION + strip.height)
    right = max((left + strip.width for left, _, _, strip in placed), default=0)
    sheet = Image.new("RGB", (max(right, min(_WIDE, right + _TITLE)), max(1, bottom)), "white")
    draw = ImageDraw.Draw(sheet)
    for left, top, title, strip in placed:
        draw.text((left + 2, top + 2), title, fill="black")
        sheet.paste(strip, (left, top + _CAPTION))
    return sheet


def _fitting(title: str, draw: ImageDraw.ImageDraw, width: int) -> str:
    """The title, or so much of its end, where its class is, as is not wider than `width` pixels."""
    if draw.textlength(title) <= width:
        return title
    return next(
        short for cut in range(1, len(title) + 1) if draw.textlength(short := f"...{title[cut:]}") <= width
    )


def _data_address(image: Image.Image) -> str:
    """The picture itself as the address of an <img>."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
