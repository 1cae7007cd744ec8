"""The optional training loop, and what it stands on: data, checkpoints, evaluation, logs."""
