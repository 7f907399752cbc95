#!/usr/bin/env bash
# One expects that reading an optimizer's state for a checkpoint changes nothing. torch's get_optimizer_state_dict (the way that
# distributed-checkpoint tutorials save FSDP and DDP runs) makes a missing state by taking a step with zero gradients and learning
# rate 0: the weights stay, but Adam's step count is 1 afterwards. An optimizer that starts late (a GAN's discriminator, a frozen
# head) then corrects its averages for one step more, so its first real update is another one: how often a run is saved decides
# its weights. Who is hurt: VQGAN-like trainings whose discriminator starts after some thousand steps; nothing warns.
# Seen 2026-11-28 with torch 2.14.1 (CPU).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.14.1"
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def first_update(looked: bool) -> torch.Tensor:
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    adam = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0)
    if looked:
        get_optimizer_state_dict(layer, adam)
    layer(torch.ones(1, 1)).sum().backward()
    adam.step()
    return layer.weight.detach().flatten()


plain, looked = first_update(False), first_update(True)
print(f"weight after the first update: {plain.item():.4f}, with one look at the state before it: {looked.item():.4f}")
raise SystemExit(0 if not torch.equal(plain, looked) else "looking no longer changes the update")
PY
