"""Checkpoints: the whole state of a run on disk, verified before it is trained on.

Knows the folder and its names, the manifest, what is in a checkpoint, where leaves go, and Orbax, which `storage` alone
imports. Imports `update` and below, and of `loop` only `every` and `warn`; knows nothing of `fit`.
"""
