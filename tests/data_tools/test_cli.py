"""The command line answers at once and passes on what the modules say."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ["torch", "deepspeed", "mlflow", "pydantic", "numpy", "av", "pyarrow", "PIL", "sklearn", "webdataset"]


def test_importing_the_commands_imports_nothing_heavy() -> None:
    code = f"import sys, data_tools.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
