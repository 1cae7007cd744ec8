"""Result packages: the numbers, curves and pictures that one kind of task is judged by, as metrics of an `Evaluation`.

Each is an object with `names`, `function` and `figure`. Knows NumPy; scikit-learn and matplotlib are imported when they
are used. Imports of the loop nothing; what a package is, `on_host.py` says.
"""
