"""The same selectors over a mesh: where each leaf lies, its state and its sums, and which rows each process reads.

It knows the tree and JAX's shardings, and nothing of gradients, optimizers or updates, which ask it where things lie.
It may import `tree` and `errors`. What a layout costs is told a floor higher, in `planning`.
"""
