"""The ground floor: what a leaf is called, whose it is, and small arithmetic on trees.

Knows paths, the selectors that pick leaves by path, and the partition that gives every leaf to a part; helpers of text
and of arrays, for all rooms. Knows nothing of losses, optimizers or steps, and imports `functrain.errors` alone.
"""
