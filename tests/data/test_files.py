"""What is written so that it survives: errors tell which file it was."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from framework.files import append_line, replace_text

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


def test_a_full_disk_is_told_with_the_file() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        append_line(Path("/dev/full"), "line")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")
    assert str(caught.value) == "[Errno 28] No space left on device: '/dev/full'"


@pytest.mark.parametrize("length", [10, 10 << 20])  # written at the end, and in the middle
def test_a_file_that_cannot_be_replaced_stays_and_is_named(length: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "file.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        replace_text(tmp_path / "file", "x" * length)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "file"))
    assert str(caught.value) == f"[Errno 28] No space left on device: '{tmp_path / 'file'}'"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"
