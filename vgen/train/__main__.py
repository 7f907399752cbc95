"""`accelerate launch -m vgen.train CONFIG …`: the same as `vgen train CONFIG …`, in every process that accelerate starts."""

import sys

from vgen.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
