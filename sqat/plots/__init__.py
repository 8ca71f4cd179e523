"""Plots of figures with matplotlib."""
