"""The compiled update: loss, partition, optimizer and accumulation as one state and one call.

Knows the state of a run, whose turn it is, what a step computes as a pure function, and which program each kind of call
compiles. Imports `gradients`, `optim` and below; does no I/O and fetches nothing from a device.
"""
