"""Families of transformers models, tiny and random, through every stage, placement and target."""
