import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vgen.train.config import OptimizerConfig
from vgen.train.optim import Average, learning_rate, make_optimizers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.conv = nn.Conv1d(1, 2, 3)
        self.head = nn.Linear(5, 7)


def names(net, parameters):
    by_id = {id(p): name for name, p in net.named_parameters()}
    return {by_id[id(p)] for p in parameters}


def test_weight_decay_spares_vectors():
    net = Net()
    (optimizer,) = make_optimizers(net, OptimizerConfig(weight_decay=0.5))
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    assert names(net, decayed["params"]) == {"embedding.weight", "hidden.weight", "conv.weight", "head.weight"}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(net.parameters()))


def test_names_can_be_spared_from_decay():
    net = Net()
    (optimizer,) = make_optimizers(net, OptimizerConfig(weight_decay=0.5, no_decay_names=["embed", "head"]))
    assert names(net, optimizer.param_groups[0]["params"]) == {"hidden.weight", "conv.weight"}


def test_muon_gets_hidden_matrices_only():
    net = Net()
    adamw, muon = make_optimizers(net, OptimizerConfig(name="muon"))
    assert isinstance(muon, torch.optim.Muon)
    assert names(net, muon.param_groups[0]["params"]) == {"hidden.weight"}
    rest = {name for group in adamw.param_groups for name in names(net, group["params"])}
    assert rest == {name for name, _ in net.named_parameters()} - {"hidden.weight"}


def test_schedule_by_hand():
    config = OptimizerConfig(lr=2.0, warmup_steps=4, final_lr=0.1)
    assert [learning_rate(config, step, 9) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(config, 4, 9) == 2.0
    assert learning_rate(config, 6, 9) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert learning_rate(config, 8, 9) == pytest.approx(0.2)
    assert learning_rate(OptimizerConfig(lr=2.0, warmup_steps=0, schedule="constant"), 8, 9) == 2.0
    late = OptimizerConfig(lr=2.0, warmup_steps=2, final_lr=0.1, decay_from=0.6)
    assert [learning_rate(late, step, 11) for step in (1, 2, 6)] == [2.0, 2.0, 2.0]
    assert learning_rate(late, 7, 11) < 2.0 and learning_rate(late, 10, 11) == pytest.approx(0.2)
    drops = OptimizerConfig(lr=1.0, warmup_steps=0, schedule="multistep", milestones=[0.5, 0.75], drop=0.5)
    assert [learning_rate(drops, step, 8) for step in (0, 3, 4, 5, 6, 7)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


@given(
    st.integers(1, 500),
    st.integers(0, 600),
    st.floats(0, 1),
    st.sampled_from(["cosine", "constant"]),
)
def test_schedule_stays_in_range(steps, warmup, final, schedule):
    config = OptimizerConfig(lr=1.0, warmup_steps=warmup, schedule=schedule, final_lr=final)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(0 <= rate <= 1 and math.isfinite(rate) for rate in rates)
    after = rates[warmup:]
    assert all(late <= early + 1e-12 for early, late in pairwise(after))


def test_average_follows_its_recursion_and_gives_weights_back():
    net = nn.Linear(3, 2)
    average = Average(net, decay=0.5)
    expected = net.weight.detach().clone()
    for step in range(8):
        with torch.no_grad():
            net.weight.add_(torch.randn_like(net.weight))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net.weight.detach()
    torch.testing.assert_close(average.values["weight"], expected)
    own = net.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(net.weight, expected)
    assert torch.equal(net.weight, own)
