"""`python -m normfx`, the same as `normfx`."""

from __future__ import annotations

import sys

from normfx.cli import main

if __name__ == "__main__":
    sys.exit(main())
