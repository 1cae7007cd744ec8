"""`python -m functrain`, as `functrain`."""

import sys

from functrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
