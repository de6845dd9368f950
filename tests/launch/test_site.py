"""The site file: what it may say, and what is said about the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.errors import RecipeError
from launch.site import Site, load_site, minutes


def site(folder: Path, text: str) -> Site:
    path = folder / "site.yaml"
    path.write_text(text)
    return load_site(path)


def test_defaults_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    assert load_site(None) == Site()
    (tmp_path / "none" / "tubeworks").mkdir(parents=True)
    (tmp_path / "none" / "tubeworks" / "site.yaml").write_text("partition: gpu\n")
    assert load_site(None).partition == "gpu"
    found = site(
        tmp_path, "time: 2-12\ncontainer: {image: a.sqsh, mounts: ['/data:/data']}\nenvironment: {A: '1'}\n"
    )
    assert found.container is not None
    assert (found.time, found.container.mounts, found.environment) == ("2-12", ["/data:/data"], {"A": "1"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partition: gpu\nacount: me\n", "line 2: acount: there is no such key; did you mean `account`?"),
        ("time: soon\n", "line 1: time: `soon` is no time limit: write minutes, H:MM:SS, or D-HH:MM"),
        ("environment: {MLFLOW_TRACKING_PASSWORD: x}\n", "looks like a secret and would be written"),
        ("container: {imag: x}\n", "did you mean `image`?"),
        ("nodes: 0\n", "greater than 0"),
        ("[1]\n", "must hold keys and values"),
        ("a: [\n", "cannot read the site file"),
    ],
)
def test_what_no_site_can_say(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        site(tmp_path, text)
    assert said in str(error.value)
    assert "site.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("1:30:00", 90),
        ("1:30", 2),
        ("2-12", 3600),
        ("2-12:30", 3630),
        ("0:0:1", 1),
        ("1-0", 1440),
    ],
)
def test_time_limits(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "1h", "-5", "1:2:3:4", "1.5"])
def test_no_time_limits(text: str) -> None:
    with pytest.raises(ValueError, match=r"time limit|less than a minute"):
        minutes(text)
