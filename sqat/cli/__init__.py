"""The command line: one file per command, named after it.

Options that several commands share are in `options`. `commands` lists all commands, and `exit_codes` is the one place
that ends the program. Heavy imports (torch, transformers, pydantic, Rich) stand inside the command functions, after
the checks that do not need them.
"""

from sqat.cli.commands import app as app
from sqat.cli.exit_codes import main as main
