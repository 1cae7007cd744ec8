"""What reaches what, and what it costs, found by tracing before anything is computed.

Knows how to follow a leaf through a traced program, and how to tell of it in a table. Imports `update` and below. Not
called audit, as the function `ft.audit` would hide it.
"""
