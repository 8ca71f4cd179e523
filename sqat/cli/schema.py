"""`sqat schema`: the JSON schema of recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="file to write; default: print the schema")
    ] = None,
) -> None:
    """Print the JSON schema of recipes."""
    from sqat.recipe.json_schema import schema_text

    if output is None:
        from sqat.cli.printing import print_text

        for line in schema_text().splitlines():
            print_text(line)
    else:
        from sqat.checkpoint.outputs import check_output
        from sqat.files.replace import replace_file

        check_output(output, ".json")
        replace_file(output, schema_text().encode())
