"""`python -m lockfree`."""

import os
import sys

from lockfree.cli import main
from lockfree.launch import launched

code = main()
if launched():
    # Python would take down the connections to the other processes, and its daemon threads, while the others do: that can abort,
    # and nothing is left that needs it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
