"""Faults on purpose: a pipeline is killed, starved of disk, damaged and doubled, and must come out the same."""
