"""What media may be, for those who make shards and those who read them: bytes may come from a stranger."""

from __future__ import annotations

__all__ = [
    "CONTAINER_OPTIONS",
    "DECODE_SECONDS",
    "IMAGE_FORMATS",
    "MAX_FRAME_SIDE",
    "MAX_IMAGE_PIXELS",
    "READ_SECONDS",
]

MAX_IMAGE_PIXELS = 1 << 26
"""Images with more pixels are refused before they are decoded."""

MAX_FRAME_SIDE = 8192
"""Video frames wider or higher than this are refused before they are decoded."""

DECODE_SECONDS = 120.0
"""A worker that is at one stage of a sample for longer hangs."""

READ_SECONDS = 900.0
"""The same for reading: whole shards may have to come from far away first."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that Pillow may try. Others run programs (EPS starts Ghostscript) or are hardly tested."""

CONTAINER_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg",
    "protocol_whitelist": "pipe",
}
"""Options of FFmpeg's demuxers. Playlists and the like would make it open other files or addresses."""
