"""Imported by every Python that has this folder on its path: gives training steps a known, slower pace.

The tiny model of the tests is done before anybody could interrupt it. `TEST_STEP_SECONDS` is slept after each
step, `TEST_FILE_SECONDS` before each file of a checkpoint is written. Nothing else is touched.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time


class _Pace(importlib.abc.MetaPathFinder):
    """Wraps one function of two modules when they are imported."""

    wanted = {  # noqa: RUF012
        "framework.training.loop": ("finish_step", "TEST_STEP_SECONDS"),
        "framework.training.storage": ("write_tensors", "TEST_FILE_SECONDS"),
    }

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.wanted:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            self._slow_down(spec.loader, *self.wanted[fullname])
        return spec

    def _slow_down(self, loader, name, variable):
        seconds, execute = float(os.environ.get(variable, "0")), loader.exec_module

        def exec_module(module):
            execute(module)
            function = getattr(module, name)

            def slower(*arguments, **options):
                time.sleep(seconds)
                return function(*arguments, **options)

            setattr(module, name, slower)

        if seconds:
            loader.exec_module = exec_module


sys.meta_path.insert(0, _Pace())
