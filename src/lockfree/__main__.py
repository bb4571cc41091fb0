"""`python -m lockfree`."""

import sys

from lockfree.cli import main

sys.exit(main())
