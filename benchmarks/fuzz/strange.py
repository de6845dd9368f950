"""Tar archives with members that no archive of samples has: names that climb out, links, devices, holes."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass

import numpy as np

from benchmarks.fuzz.damage import flip_bits, picture

__all__ = ["GOOD", "INTRUDER", "Strange", "strange_archives", "strange_shards"]

Rng = np.random.Generator
Members = list[tuple[tarfile.TarInfo, bytes]]

GOOD = {f"good/{number:04d}": picture(number, "PNG") for number in range(4)}
"""The samples that every archive holds, by their keys; sample n has label n."""
INTRUDER = picture(99, "PNG")
"""What no reader may ever get."""


@dataclass(frozen=True)
class Strange:
    """An archive: what is wrong with it, keys of which each must be refused, and its bytes."""

    what: str
    refused: list[str]
    data: bytes
    whole: bool = True
    """Whether all headers are there; else the good samples behind the damage may be lost, with a word."""


def _tar_of(members: Members) -> bytes:
    """An archive of members as they are, whatever they claim to be; sizes are those of the bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _member(
    name: str, kind: bytes = tarfile.REGTYPE, target: str = "", pax: dict[str, str] | None = None
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, target, pax or {}
    return info


def strange_archives(rng: Rng, count: int) -> list[Strange]:
    """Archives of class folders, to be sharded."""
    good = [(f"set/{'ab'[place % 2]}/{place}.png", data) for place, data in enumerate(GOOD.values())]
    bad: list[tuple[str, tarfile.TarInfo, bytes]] = [
        ("a path that climbs out", _member("set/a/../../../climbed.png"), INTRUDER),
        ("an absolute path", _member("/absolute/a/rooted.png"), INTRUDER),
        ("a symbolic link", _member("set/a/link.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
        ("a hard link", _member("set/a/hard.png", tarfile.LNKTYPE, "../../etc/passwd"), b""),
        ("a device", _member("set/a/device.png", tarfile.CHRTYPE), b""),
        ("a pipe", _member("set/a/pipe.png", tarfile.FIFOTYPE), b""),
    ]
    archives = []
    for number in range(count):
        what, info, data = bad[number // 3 % len(bad)]
        members = [(_member(name), content) for name, content in good]
        members.insert(int(rng.integers(0, len(members) + 1)), (info, data))
        archives.append(_maybe_damaged(rng, number, Strange(what, [info.name], _tar_of(members))))
    return archives


def _maybe_damaged(rng: Rng, number: int, strange: Strange) -> Strange:
    """Every third archive as it is, the others with a damaged header or cut off."""
    whole = strange.data
    if number % 3 == 0:
        return strange
    if number % 3 == 1:
        block = int(rng.integers(0, 4)) * 512
        header = flip_bits(whole[block : block + 512], rng)
        return Strange("a damaged header", [], whole[:block] + header + whole[block + 512 :], False)
    return Strange("cut off", [], whole[: int(rng.integers(1, len(whole) - 1024))], False)


def _strange_samples() -> dict[str, Members]:
    """What stands among the samples of a shard, each with a label as a whole sample has it."""
    link, hard = tarfile.SYMTYPE, tarfile.LNKTYPE
    first = f"{next(iter(GOOD))}.png"
    media: dict[str, tuple[tarfile.TarInfo, bytes]] = {
        "a path that climbs out": (_member("../climbed.png"), INTRUDER),
        "a path that climbs out in its middle": (_member("bad/../../../climbed.png"), INTRUDER),
        "an absolute path": (_member("/absolute/rooted.png"), INTRUDER),
        "a path that climbs out, in a long header": (
            _member("bad/0.png", pax={"path": "../" * 40 + "climbed.png"}),
            INTRUDER,
        ),
        "a symbolic link out of the archive": (_member("bad/link.png", link, "/etc/passwd"), b""),
        "a symbolic link to a sample": (_member("bad/link.png", link, first), b""),
        "a hard link out of the archive": (_member("bad/hard.png", hard, "../../etc/passwd"), b""),
        "a hard link to a sample": (_member("bad/hard.png", hard, first), b""),
        "a character device": (_member("bad/device.png", tarfile.CHRTYPE), b""),
        "a block device": (_member("bad/device.png", tarfile.BLKTYPE), b""),
        "a pipe": (_member("bad/pipe.png", tarfile.FIFOTYPE), b""),
        "a file with holes": (_member("bad/sparse.png", tarfile.GNUTYPE_SPARSE), INTRUDER),
        "a file with holes, by POSIX": (
            _member("bad/sparse.png", pax={"GNU.sparse.map": "0,9", "GNU.sparse.size": "99"}),
            INTRUDER,
        ),
        **{
            f"a size of {size}": (_member("bad/size.png", pax={"size": str(size)}), INTRUDER)
            for size in (10**15, 10**30, -512, -1024, -4096)
        },
        **{
            f"a size in the {kind}header: {size}": (_member("bad/raw.png", pax=pax), INTRUDER)
            for kind, pax in (("", {}), ("long ", {"comment": "long"}))
            for size in (2**40, 2**62, 2**80, -512, -1024, -(2**62))
        },
        "a name that is not UTF-8": (_member("bad/\udcff.png"), INTRUDER),
        "a name with a line end": (_member("bad/a\nb.png"), INTRUDER),
        "a name that speaks to the terminal": (_member("bad/\x1b[2J.png"), INTRUDER),
        "a name of no letters": (_member(".png"), INTRUDER),
    }
    samples = {what: [one, _label_of(one[0].name)] for what, one in media.items()}
    samples["a label that is a symbolic link"] = [
        (_member("bad/0.png"), INTRUDER),
        (_member("bad/0.cls", link, "/etc/passwd"), b""),
    ]
    samples["a label that is a hard link"] = [
        (_member("bad/0.png"), INTRUDER),
        (_member("bad/0.cls", hard, f"{next(iter(GOOD))}.cls"), b""),
    ]
    return samples


def _with_size(data: bytes, place: int, what: str) -> bytes:
    """The archive with the size that `what` ends with in the header at `place`, in base 256."""
    header = bytearray(data[place : place + tarfile.BLOCKSIZE])
    number = int(what.rpartition(" ")[2])
    header[124:136] = (number % 2**96 | (2**95 if number > 0 else 0)).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:place] + bytes(header) + data[place + tarfile.BLOCKSIZE :]


def _label_of(name: str) -> tuple[tarfile.TarInfo, bytes]:
    return _member(name.removesuffix("png") + "cls"), b"3"


def strange_shards(rng: Rng, count: int) -> list[Strange]:
    """WebDataset shards as they are served: `GOOD`, and one strange sample among them."""
    kinds = list(_strange_samples().items())
    shards = []
    for number in range(count):
        what, bad = kinds[number // 3 % len(kinds)]
        samples = [
            [(_member(f"{key}.png"), data), (_member(f"{key}.cls"), str(label).encode())]
            for label, (key, data) in enumerate(GOOD.items())
        ]
        samples.insert(int(rng.integers(0, len(samples) + 1)), bad)
        key = bad[0][0].pax_headers.get("path", bad[0][0].name).removesuffix(".png")
        data = _tar_of([member for sample in samples for member in sample])
        lost = what.startswith("a size")  # nothing behind it can be found
        if "header" in what and lost:
            data = _with_size(data, data.index(b"././@PaxHeader" if "long" in what else b"bad/raw.png"), what)
        strange = Strange(what, [] if lost else [key], data, not lost)
        shards.append(_maybe_damaged(rng, number, strange))
    return shards
