"""What all tests share: few threads, and no colours or wrapped lines in what commands print."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_COLOR", "1")
os.environ["COLUMNS"] = "200"
os.environ.pop("FORCE_COLOR", None)
