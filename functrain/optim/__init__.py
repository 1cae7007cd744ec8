"""One optax transform per part.

Knows what an optimizer step does to each part, learning rates that are state, the form of optimizer states, and what a
new optimizer takes over from an old one. Imports `tree` and `errors`; knows nothing of losses.
"""
