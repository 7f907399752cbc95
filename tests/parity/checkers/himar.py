"""Hi-MAR: unknown counts and guidance of both phases."""

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.samplers.schedules import mar_guidance, mar_unknown


@checker("himar.schedules")
def check_schedules(fixture: Fixture):
    config = fixture.config
    scale = config["cond_scale"]
    phases = {"phase1": (scale * scale, 4 * scale, config["re_cfg"])}
    phases |= {f"phase2_T{steps}": (config["tokens"], steps, config["cfg"]) for steps in config["T"]}
    for name, (tokens, steps, guidance) in phases.items():
        counts, weights = mar_unknown(tokens, steps), mar_guidance(tokens, steps, guidance)
        assert_equal(torch.tensor(counts), fixture.outputs[f"{name}/masked_before"], name)
        assert_close(torch.tensor(weights), fixture.outputs[f"{name}/cfg"], what=name)
