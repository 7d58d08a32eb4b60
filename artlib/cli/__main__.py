"""``python -m artlib.cli``."""

import sys

from .parser import main

sys.exit(main())
