"""The command line: `functrain show`, `report`, `checkpoints`, `verify`, `diff`, `export`.

Knows the folder of a run and reads it; writes nothing but reports and what `export` is asked for; runs nothing that a
file contains. A command is a module by its name, whose `run` gives an `Answer`; `main` alone prints. What needs no
arrays imports no JAX. Imports the loop and all below; nobody imports it.
"""
