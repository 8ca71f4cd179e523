"""The stages: each takes one checkpoint and returns one; none saves anything.

Another stage is one file with a `run` here, one section in `sqat.recipe.stages` and one line in this table.
"""
