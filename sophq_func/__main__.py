"""``python -m sophq_func``: see :mod:`sophq_func.cli.commands`."""

import sys

from sophq_func.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
