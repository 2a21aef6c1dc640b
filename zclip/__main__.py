"""`python -m zclip replay FILE ...`: see `zclip.replay`."""

import sys

from zclip.replay import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
