"""python -m ftjax."""

import sys

from ftjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
