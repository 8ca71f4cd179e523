"""Hostile inputs by the thousand, each made by a generator that knows the format and tried on sqat.

A generator is one file with `make_case`, and one line in `generators`.
"""
