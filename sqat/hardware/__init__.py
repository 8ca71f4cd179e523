"""The machine: its processor, GPUs and libraries, and which export targets it can run."""
