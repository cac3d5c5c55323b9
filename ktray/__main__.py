"""``python -m ktray``."""

import sys

from ktray.cli import main

sys.exit(main())
