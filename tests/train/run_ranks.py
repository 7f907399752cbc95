"""`python run_ranks.py CONFIG RESULT PORT PORT PORT`: one rank of three trainings: whole, stopped by a signal to rank 1 alone, and continued.

Writes the exit code of each to RESULT. Started by tests, once per rank, with the variables of torchrun.
"""

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from vgen.train.loop import train
from vgen.train.system import SYSTEMS, load_config

SYSTEMS["tiny"] = "train.tiny_system"

if __name__ == "__main__":
    path, result, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[2]).parent
    runs = [(f"out={out / 'whole'}",), ("signal_from=1",), ("signal_from=1",)]
    codes = []
    for run, port in zip(runs, sys.argv[3:], strict=True):
        os.environ["MASTER_PORT"] = port
        PartialState._reset_state()  # the end of a training ends its process group
        codes.append(train(load_config(path, run)).exit_code)
    result.write_text(json.dumps(codes))
