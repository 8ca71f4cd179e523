"""The machine: its CPU, GPUs and packages, and what each backend and export target needs of it."""
