"""`python -m fastsae`: the command line."""

import sys

from fastsae.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
