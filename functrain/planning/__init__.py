"""The plan: what each device holds, computes and sends in a step, from shapes alone.

Knows how to read the program that XLA makes of an update, and whose parameters each of its operations is about.
Imports `update`, `mesh` and below; compiles programs and runs none, and writes only what XLA shows of them, to a folder
that it removes.
"""
