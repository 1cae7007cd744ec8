"""How much of what could go on for ever a session does: 1 in `make test`, more in `make soak`."""

import os

SOAK = int(os.environ.get("SOAK", "1"))
