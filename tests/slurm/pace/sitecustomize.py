"""Imported by every Python that has this folder on its path: gives training steps a known, slower pace.

The tiny model of the tests is done before anybody could interrupt it. `TEST_STEP_SECONDS` is slept after each
step, `TEST_FILE_SECONDS` before each file of a checkpoint is written. Into the file `TEST_PHASES` goes when
phases of a start began and ended (see `phases`). Nothing else is touched.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time

PHASES = os.environ.get("TEST_PHASES", "")


def _note(name):
    if PHASES:
        rank = os.environ.get("SLURM_PROCID", "0") if "launch.task" in sys.orig_argv else "-"
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        line = f"{time.time():.3f} {os.environ.get('SLURM_JOB_ID', '-')} {restart} {rank} {name}\n"
        with open(PHASES, "a") as file:
            file.write(line)


def _slower(function, seconds):
    def slower(*arguments, **options):
        time.sleep(seconds)
        return function(*arguments, **options)

    return slower


def _noted(function, name):
    left = [2]  # a rank makes steps for a long time

    def noted(*arguments, **options):
        try:
            return function(*arguments, **options)
        finally:
            left[0] -= 1
            if left[0] > 0:
                _note(name)

    return noted


class _Pace(importlib.abc.MetaPathFinder):
    """Wraps functions of some modules when these are imported."""

    slowed = {  # noqa: RUF012
        "framework.training.steps": ("finish_step", "TEST_STEP_SECONDS"),
        "framework.training.storage": ("write_tensors", "TEST_FILE_SECONDS"),
    }
    noted = {  # noqa: RUF012
        "framework.training.distributed": ("meet",),
        "framework.training.loop": (
            "start_process_group",
            "open_data",
            "choose_checkpoint",
            "build_model",
            "start_engine",
            "prepare",
            "Recorder",
        ),
        "framework.training.steps": ("take_step",),
    }

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.slowed and fullname not in self.noted:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            self._wrap(spec.loader, fullname)
        return spec

    def _wrap(self, loader, fullname):
        execute = loader.exec_module
        name, variable = self.slowed.get(fullname, ("", ""))
        seconds = float(os.environ.get(variable, "0"))

        def exec_module(module):
            execute(module)
            _note(f"{fullname} imported")
            if seconds:
                setattr(module, name, _slower(getattr(module, name), seconds))
            for one in self.noted.get(fullname, ()) if PHASES else ():
                setattr(module, one, _noted(getattr(module, one), one))

        loader.exec_module = exec_module


_note("batch script" if "submitit.core._submit" in sys.orig_argv else "python")
sys.meta_path.insert(0, _Pace())
