"""Pure gradients, by part.

Knows what a loss function may take and return, train steps, which losses a part learns from, which leaves a gradient
reaches, and the sums of gradients over batches. Imports `tree` and `errors`; knows of no optimizer.
"""
