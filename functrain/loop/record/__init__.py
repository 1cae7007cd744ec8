"""What a run leaves for people: its record, `run.json`, log, results, figures, source and report.

Knows the files of a record's folder, what may stand in them, and how they are shown. `reading` and the report import no
JAX; the rest imports the loop and all below. Nothing that a file contains is executed.
"""
