"""The run's pages in MLflow, as a real browser shows them: curves, parameters, recipe and pictures.

The pages are also kept as screenshots in the test's temporary folder, for the eye.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from framework.recipe import dump_yaml
from framework.recipe.schema import Recipe
from framework.tracking import Journal, MlflowMirror, RunInfo
from framework.tracking.pictures import Tile, contact_sheet
from framework.tracking.sender import load_state

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", *QUIET]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium"),
]


class Pages:
    """The pages of one run."""

    def __init__(self, root: str, folder: Path) -> None:
        self.root = root
        self.folder = folder

    def _browse(self, page: str, *arguments: str) -> str:
        profile = self.folder / "profile"
        shutil.rmtree(profile, ignore_errors=True)  # a new visitor, whose pages remember nothing
        command = [str(BROWSER), *OPTIONS, f"--user-data-dir={profile}", "--window-size=1600,1400"]
        # virtual time stands still while the page waits for an answer: generous, and over soon
        command += [
            "--virtual-time-budget=120000",
            *arguments,
            f"{self.root}{page}?workflowType=machine_learning",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
        return done.stdout

    def document(self, page: str, awaited: str) -> str:
        """The page's elements once they have `awaited`, a pattern: a busy browser gives up early at times."""
        for _ in range(6):
            found = self._browse(page, "--dump-dom")
            if re.search(awaited, found):
                break
        return found

    def screenshot(self, page: str, name: str) -> Image.Image:
        self._browse(page, f"--screenshot={self.folder / name}")
        return Image.open(self.folder / name).convert("RGB")


@pytest.fixture(scope="module")
def pages(server: Any, tmp_path_factory: pytest.TempPathFactory, recipe_for: Callable[..., Recipe]) -> Pages:
    """A run with curves and a picture, mirrored to a server in the usual way."""
    folder = tmp_path_factory.mktemp("runs")
    run = folder / "pages"
    run.mkdir()
    recipe = recipe_for(server.uri)
    (run / "recipe.yaml").write_text(dump_yaml(recipe))
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    frames[..., 0] = 255
    contact_sheet([Tile(frames, "up", "up")], run / "pictures" / "predictions-motion.png", "motion")
    mirror = MlflowMirror(run, recipe, RunInfo(manifests={"digits": "ab" * 16}, git={}), poll_seconds=0.2)
    mirror.start()
    with Journal(run, 0, 0) as journal:
        for step in range(1, 101):
            journal.write(step, {"train/loss": math.exp(-step / 30), "system/cpu_percent": 50.0})
    assert mirror.close("FINISHED", timeout=120)
    state = load_state(run)
    root = f"{server.uri}/#/experiments/{state['experiment_id']}/runs/{state['run_id']}"
    return Pages(root, folder)


def test_overview_shows_name_description_metrics_and_parameters(pages: Pages) -> None:
    document = pages.document("", "optimizer.lr")
    for text in (
        "tracked (pages)",
        "Digits that move.",
        "99 %",
        "train/loss",
        "optimizer.lr",
        "0.001",
        "Finished",
    ):
        assert text in document, text


def test_curves_are_drawn(pages: Pages) -> None:
    line = r'class="js-line" d="([^"]+)"'
    document = pages.document("/model-metrics", line)
    assert "train" in document
    corners = [points.count(",") for points in re.findall(line, document)]
    assert corners, "the chart of the loss has a curve"
    assert max(corners) > 20, "and it is bent"
    assert pages.screenshot("/model-metrics", "curves.png").size == (1600, 1400)


def test_system_metrics_have_their_page(pages: Pages) -> None:
    assert "cpu_percent" in pages.document("/system-metrics", "cpu_percent")


def test_recipe_can_be_read(pages: Pages) -> None:
    document = pages.document("/artifacts/recipe.yaml", "mixture")
    assert "recipe.yaml" in document
    assert "pictures" in document
    assert "mixture" in document, "the content of the recipe"


def test_pictures_can_be_seen(pages: Pages) -> None:
    """The sheet's frames are pure red, which nothing else on the page is."""
    shot = pages.screenshot("/artifacts/pictures/predictions-motion.png", "picture.png")
    red = (np.asarray(shot) == (255, 0, 0)).all(axis=2).sum()
    assert red > 10_000
