"""`sqat doctor`: this machine, and what backends and targets need here."""

from __future__ import annotations

from sqat.cli.options import Json, Verbose


def doctor(json: Json = False, verbose: Verbose = 0) -> None:
    """Show this machine, and what backends and targets lack on it."""
    from sqat.cli.tables.doctor import print_diagnosis
    from sqat.hardware.doctor import diagnose

    print_diagnosis(diagnose(), as_json=json)
