"""Steps that take their time without a CPU, as on a GPU: so that on a small machine three instances do more than one."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

STEP_S = 0.06
MODULE = "tailserve.engine.model.runner"


class _Finder(importlib.abc.MetaPathFinder):
    """Changes the module when it is imported: most workers never do, and need not wait for it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_slow_down(module: Any) -> None:
            execute(module)
            run = module.ModelRunner.run

            def wait_and_run(self: Any, batch: Any) -> Any:
                time.sleep(STEP_S)
                return run(self, batch)

            module.ModelRunner.run = wait_and_run

        loader.exec_module = execute_and_slow_down
        return spec


def install() -> None:
    """In each of Ray's workers."""
    sys.meta_path.insert(0, _Finder())
