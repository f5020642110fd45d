"""``python -m sophq_func``: see :mod:`sophq_func.cli`."""

import sys

from sophq_func.cli import main

if __name__ == "__main__":
    sys.exit(main())
