"""Metrics of a checkpoint or an exported file, as it will be served."""
