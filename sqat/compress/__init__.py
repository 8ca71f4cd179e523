"""Prune, calibrate and distil a model: the one layer that stages, api and analyze share."""
