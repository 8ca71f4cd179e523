"""The recipe language: its schema, its loader, and the checks between its parts."""
