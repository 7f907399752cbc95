"""LPD: generation orders and the published group sizes."""

import torch
from parity.registry import Fixture, assert_equal, checker

from vgen.samplers.orders.locality import RecordedDraws, locality_sequence
from vgen.samplers.schedules import lpd_sizes


@checker("lpd.orders")
def check_orders(fixture: Fixture):
    for index, run in enumerate(fixture.config["runs"]):
        recorded = {name: fixture.inputs.get(f"r{index}_{name}") for name in ("first", "shuffles", "fps_random")}
        picks = [] if recorded["fps_random"] is None else recorded["fps_random"].tolist()
        draws = RecordedDraws(int(recorded["first"]), recorded["shuffles"].numpy(), picks)
        sizes = fixture.inputs[f"r{index}_group_sizes"].tolist()
        sizes[0] = 1  # the first call decodes one cell whatever the list says
        order = locality_sequence(
            (1, run["grid"], run["grid"]), sizes, run["proximity_threshold"], run["repulsion_threshold"], draws
        )
        assert_equal(torch.from_numpy(order), fixture.outputs[f"r{index}_order"], f"run {index}")


@checker("lpd.group_sizes")
def check_group_sizes(fixture: Fixture):
    tokens = {"256": 256, "512": 1024}  # image size -> positions, 16 pixels a token
    for resolution, steps in fixture.config["which"]:
        sizes = torch.tensor(lpd_sizes(tokens[resolution], steps))
        assert_equal(sizes, fixture.outputs[f"{resolution}_{steps}"], f"{resolution}/{steps}")
