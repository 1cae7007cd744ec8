"""What a run leaves for people: run.json, the log, results, figures, the report.

Knows the folder of a record and reads it, however much of it is there; what draws the report imports matplotlib when it
draws. Imports of `loop` what reads files, `loop/checkpoint` and rooms below; `fit` knows it as a hook.
"""
