"""MAR: unknown counts, predicted counts and guidance of every step."""

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.samplers.schedules import mar_guidance, mar_unknown


@checker("mar.schedules")
def check_schedules(fixture: Fixture):
    out, config = fixture.outputs, fixture.config
    for steps in config["T"]:
        before = torch.tensor([*mar_unknown(config["tokens"], steps), 0])
        weights = torch.tensor(mar_guidance(config["tokens"], steps, config["cfg"]))
        assert_equal(before[:-1], out[f"T{steps}/masked_before"], f"T{steps} unknown")
        assert_equal(before[:-1] - before[1:], out[f"T{steps}/predicted"], f"T{steps} predicted")
        assert_close(weights, out[f"T{steps}/cfg"], what=f"T{steps} cfg")
