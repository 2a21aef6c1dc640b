"""`python -m zclip replay FILE ...`: see `zclip.replay`."""

import sys

from zclip.replay import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
