"""The checkpoint directory: its files, its manifest, and how files are written whole or not at all."""
