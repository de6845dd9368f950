"""GPUs by what nvidia-smi says; the text is in the form that `--format=csv,noheader,nounits` has."""

from __future__ import annotations

from pathlib import Path

from launch.gpu_health import check_gpus, gpu_problems, xid_problems

TABLE = """\
0, GPU-aaaa1111, NVIDIA H100 80GB HBM3, 4, 0, No, No
1, GPU-bbbb2222, NVIDIA H100 80GB HBM3, 4, 0, No, No
2, GPU-cccc3333, NVIDIA H100 80GB HBM3, 40123, 3, Yes, No
3, GPU-dddd4444, NVIDIA H100 80GB HBM3, 4, [N/A], [N/A], Yes
"""


def test_healthy_gpus_pass() -> None:
    problems, seen = gpu_problems(TABLE, "", 2, "0,1")
    assert problems == []
    assert seen == "2 x NVIDIA H100 80GB HBM3"
    assert gpu_problems(TABLE, "", 2, "GPU-aaaa,GPU-bbbb")[0] == []


def test_what_is_wrong_is_named() -> None:
    problems, _ = gpu_problems(TABLE, "GPU-bbbb2222, 4711\n", 5, None)
    assert problems == [
        "5 GPUs are asked for, nvidia-smi sees 4",
        "GPU 1 is busy: process 4711 computes on it",
        "GPU 2 is not idle: 40123 MiB are taken",
        "GPU 2 has 3 uncorrected ECC errors",
        "GPU 2 waits for a reset to remap a bad row of memory",
        "GPU 3 could not remap a bad row of memory: it has to be replaced",
    ]


def test_only_serious_and_recent_xids_count() -> None:
    log = """\
[  100.000001] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.
[200000.000001] NVRM: Xid (PCI:0000:3b:00): 31, pid=2, MMU fault of a program
[200001.000001] NVRM: Xid (PCI:0000:5e:00): 94, pid=3, Contained ECC error
"""
    assert xid_problems(log, boot_seconds=200_100.0) == ["Xid 94 at PCI:0000:5e:00"]
    assert len(xid_problems(log, boot_seconds=300.0)) == 2


def test_device_files_are_no_gpus(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").write_text("")
    problems, _ = check_gpus(1, {"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"})
    assert problems == ["1 GPUs are asked for, and there is no nvidia-smi: no driver is installed"]
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/sh\nexit 9\n")
    broken.chmod(0o755)
    assert "does not answer" in check_gpus(1, {"PATH": f"{tmp_path}:/usr/bin:/bin"})[0][0]
