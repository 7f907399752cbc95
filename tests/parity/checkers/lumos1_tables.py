"""Lumos-1: history pattern, masked counts and confidence temperatures."""

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.samplers.schedules import lumos_history, lumos_temperatures, lumos_unknown


@checker("lumos1.tables")
def check_tables(fixture: Fixture):
    out = fixture.outputs
    for index, entry in enumerate(fixture.config["history"]):
        assert_equal(lumos_history(entry["length"], entry["ratio"]), out[f"history_{index}"], f"history {index}")
    for index, entry in enumerate(fixture.config["schedule"]):
        counts = lumos_unknown(entry["tokens"], entry["steps"]) * entry["frames"]
        temperatures = lumos_temperatures(entry["steps"], entry["frames"])
        assert_equal(torch.tensor(counts), out[f"mask_len_{index}"], f"counts {index}")
        assert_close(torch.tensor(temperatures), out[f"temperature_{index}"], what=f"temperature {index}")
