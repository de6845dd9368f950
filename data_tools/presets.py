"""How media are stored: as they came, or encoded anew so that training decodes them fast.

Training decodes every sample in every epoch, so an encoding that is cheap to decode saves its own cost many
times over (`tubeworks data bench` measures it). Figures behind the choices: `benchmarks/results/decode.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from framework.errors import DataError

__all__ = ["PRESETS", "Preset", "parse_preset"]


@dataclass(frozen=True, slots=True)
class Preset:
    """An encoding of videos (H.264 in mp4, without sound) and images (JPEG).

    `short_side` in pixels, larger ones are scaled down, smaller ones kept; `gop` in frames; `crf` is x264's
    quality (lower is better and bigger); `fastdecode` leaves out what is slow to decode (CABAC, deblocking);
    `fps` leaves out frames of videos with more; `quality` is that of JPEG. A `name` of `archive` keeps bytes.
    """

    name: str
    short_side: int = 320
    gop: int = 32
    crf: int = 20
    fastdecode: bool = False
    fps: float = 0.0
    quality: int = 92

    @property
    def keeps_bytes(self) -> bool:
        """Whether files go into the shards as they are."""
        return self.name == "archive"


PRESETS = {
    "archive": Preset("archive"),
    "balanced": Preset("balanced"),
    "fast": Preset("fast", short_side=256, gop=16, crf=21, fastdecode=True, fps=30.0, quality=88),
}
_BOUNDS = {
    "short_side": (16, 8192), "gop": (1, 10_000), "crf": (0, 51), "fps": (0.0, 1000.0), "quality": (1, 100)
}  # fmt: skip


def parse_preset(text: str) -> Preset:
    """`fast`, or `fast:short_side=320,fps=15`; DataError that lists what there is for anything else."""
    name, _, changes = text.partition(":")
    if name not in PRESETS:
        raise DataError(
            f"--preset {text!r}: there is {', '.join(PRESETS)}, as in fast or fast:short_side=320"
        )
    preset = PRESETS[name]
    if changes and preset.keeps_bytes:
        raise DataError(f"--preset {text!r}: archive keeps every byte, there is nothing to set")
    values: dict[str, Any] = {}
    for part in changes.split(",") if changes else ():
        option, _, value = part.partition("=")
        values[option] = _value(text, option, value)
    return replace(preset, **values)


def _value(text: str, option: str, value: str) -> Any:
    known = {field.name: field.default for field in fields(Preset) if field.name != "name"}
    if option == "fastdecode" and value in ("true", "false"):
        return value == "true"
    if option not in _BOUNDS:
        raise DataError(f"--preset {text!r}: {option!r} cannot be set; it takes {', '.join(known)}")
    low, high = _BOUNDS[option]
    try:
        number = type(known[option])(value)
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        raise DataError(f"--preset {text!r}: {option} is a number from {low} to {high}, not {value!r}")
    return number
