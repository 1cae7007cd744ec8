"""What reaches what, and what it costs, found by tracing; and of which operation NaN comes, found by computing.

Knows how to follow a leaf, or a number, through a traced program, and how to tell of it. Imports `update` and below.
Not called audit, as the function `ft.audit` would hide it.
"""
