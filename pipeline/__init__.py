"""RLHF on Helpful & Harmless data, as one pipeline of Slurm jobs."""

__version__ = "0.1.0"
