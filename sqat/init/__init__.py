"""`sqat init`: a first recipe from a data file."""
