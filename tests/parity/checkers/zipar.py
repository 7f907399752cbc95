"""ZipAR: the schedule of the released LlamaGen variant."""

import torch
from parity.registry import Fixture, assert_equal, checker

from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas


@checker("zipar.schedule")
def check_schedule(fixture: Fixture):
    counts = {(n, w): (calls, widest) for n, w, calls, widest in fixture.outputs["counts"].tolist()}
    for side, window in fixture.config["pairs"]:
        order = make_order("zip", (side, side), window=window, faithful=True)
        rows = []
        for step in order.steps(Canvas.blank(order.grid, 1)):
            predicted = torch.full_like(step.feed.slot, -1)
            predicted[step.feed.reads] = step.targets
            index = torch.full_like(predicted, step.index)
            rows.append(torch.stack((index, step.feed.slot, step.feed.source, predicted), dim=1))
        assert_equal(torch.cat(rows), fixture.outputs[f"sched_{side}_{window}"], f"{side}, {window}")
        assert (order.calls, max(len(row) for row in rows)) == counts[side, window]
        if window < side:
            assert order.calls == 2 * side + (side - 2) * window
