"""Make pictures from words: `python sample.py --prompt "red apple"`. The same as `vgen sample`; see `python sample.py --help`."""

import sys
from pathlib import Path

# Python puts this file's folder first on the path, where our kernels/ would shadow the Hugging Face package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

if __name__ == "__main__":
    from vgen.cli.main import main

    sys.exit(main(["sample", *sys.argv[1:]]))
