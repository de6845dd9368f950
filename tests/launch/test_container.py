"""What ranks in a container see: all that the run writes and reads beside its shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.submission import Submission
from launch.supervisor import preflight_command, step_command


def mounts_of(command: list[str]) -> list[str]:
    (option,) = [word for word in command if word.startswith("--container-mounts=")]
    return option.removeprefix("--container-mounts=").split(",")


@pytest.mark.parametrize("command", [step_command, preflight_command])
def test_a_container_sees_the_code_and_the_store_beside_the_run(command: object, tmp_path: Path) -> None:
    """The run of a sweep: `code` is a link to the sweep's, `mlflow.db` lies beside the run."""
    assert callable(command)
    run = tmp_path / "sweep" / "0-lr=1e-3"
    run.mkdir(parents=True)
    (run.parent / "code").mkdir()
    (run / "code").symlink_to("../code")
    container = {"image": "image.sqsh", "mounts": ["/data:/data:ro"], "python": "/opt/bin/python"}
    words = command(run, Submission(run=str(run), name="tiny", container=container))
    mounts = mounts_of(words)
    assert mounts == [f"{run.parent}:{run.parent}", "/data:/data:ro"]
    seen = [Path(mount.split(":")[0]) for mount in mounts]
    for needed in ((run / "code").resolve(), run / "logs", run.parent / "mlflow.db"):
        assert any(needed.is_relative_to(place) for place in seen), needed
    assert f"--container-workdir={run}/code" in words
    assert words[words.index("-u") - 1] == "/opt/bin/python"


def test_a_container_gets_no_root_folder() -> None:
    words = step_command(Path("/run1"), Submission(run="/run1", name="tiny", container={"image": "a.sqsh"}))
    assert mounts_of(words) == ["/run1:/run1"]
