"""The host side, for those who want it: data, evaluation, logs, checkpoints, hooks, and `fit`, which runs them.

Knows files, clocks, signals and processes; does no arithmetic on gradients. Imports all rooms below; Orbax, Grain and
the loggers are imported by the file that uses them, when it is used. The core never imports it.
"""
