"""Run train.py and print whether it has imported wandb: `python imported_modules.py OVERRIDE ...`."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv[0] = str(Path(__file__).parents[2] / "train.py")
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print("wandb is imported:", "wandb" in sys.modules)
