"""The doors for files: which files are read, and how far, and which are replaced."""
