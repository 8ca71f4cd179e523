"""Importing sqat changes nothing outside it: no logging level, attention function, warning filter or environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import importlib, json, logging, os, pathlib, signal, sys, warnings
import sqat

root = pathlib.Path(sqat.__file__).parent
names = [".".join(("sqat", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
         for path in sorted(root.rglob("*.py")) if path.name != "__main__.py"]
libraries = json.loads(sys.argv[1])
if libraries is None:  # the first interpreter tells which libraries sqat imports
    before = set(sys.modules)
    for name in names:
        importlib.import_module(name)
    print(json.dumps([name for name in sys.modules if name not in before and not name.startswith("sqat")]))
    sys.exit()


def state():
    import torch
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils import logging as transformers_logging

    loggers = {name: logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict)}
    return {
        "levels": {name: logger.level for name, logger in loggers.items() if not name.startswith("sqat")},
        "handlers": {name: len(logger.handlers) for name, logger in loggers.items()},
        "root": [logging.root.level, len(logging.root.handlers), logging.root.manager.disable],
        "progress bars": transformers_logging.is_progress_bar_enabled(),
        "attention": [sorted(ALL_ATTENTION_FUNCTIONS), sorted(ALL_MASK_ATTENTION_FUNCTIONS)],
        "warnings": [str(entry) for entry in warnings.filters],
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "hooks": [str(sys.excepthook), str(sys.displayhook)],
        "torch": [torch.get_num_threads(), str(torch.get_default_dtype()), torch.initial_seed(),
                  torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
                  torch.is_grad_enabled(), torch.backends.mkldnn.enabled],
    }


for name in libraries:
    try:
        importlib.import_module(name)
    except Exception:  # a part that only its own library can import
        pass
before = state()
for name in names:
    importlib.import_module(name)
print(json.dumps([before, state()]))
"""


def run(libraries: list[str] | None) -> list[object]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(libraries)], stdout=subprocess.PIPE, text=True,
                          check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    found: list[object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_importing_every_module_changes_nothing_outside_sqat() -> None:
    before, after = run(run(None))  # type: ignore[arg-type]
    assert after == before
