"""The stages: each takes a checkpoint and returns one; none saves anything.

Another stage is a file with a `run` here, a section in `sqat.recipe.stages` and a line in `sqat.pipeline`.
"""
