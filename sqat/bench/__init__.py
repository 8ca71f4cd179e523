"""`sqat bench`: how fast artifacts are here, in which runtime, how sure that is, and whether they compute the same."""
