"""What all tests share: few threads, signals that end programs, output without colours or wrapped lines."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_COLOR", "1")
os.environ["COLUMNS"] = "200"
os.environ.pop("FORCE_COLOR", None)
# A shell that starts us in the background, or nohup, ignores these, and what we start would inherit that;
# what is caught here is as usual there.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda number, frame: None)
