"""The command line: thin commands over `sqat.pipeline.runner` and its neighbours, and the one place that exits.

`commands` lists them all; each is a function of `running`, `looking`, `machine` or `writing`. Heavy imports (torch,
transformers, pydantic, Rich) are inside their bodies, so that ``--help`` is quick, and behind what can be checked
without them, so that a mistake is. Exit codes: 0, 1 a fault of this program, 2 the user's mistake, 3 a missed quality
gate, 130 interrupted.
"""

from sqat.cli.commands import app as app
from sqat.cli.ending import main as main
