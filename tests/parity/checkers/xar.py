"""xAR: tables, time grids, training forwards with gradients, and whole sampling traces (velocities, states, fed times, cache lengths)."""

import torch
from einops import rearrange
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.layers.rope2d import rotate_pairs
from vgen.models.xar.entities import Layout, entity_order
from vgen.models.xar.xar import XARModel, time_index
from vgen.samplers.choice import FlowChoice
from vgen.samplers.decode import decode
from vgen.samplers.flow import even_times, logit_normal_times, sde_times
from vgen.samplers.noise import TapeNoise
from vgen.samplers.types import Canvas

TIMES = {"sde": sde_times, "euler": even_times}


def _cells(grid: int, per_side: int) -> str:
    return f"blocks-{grid // per_side}"


@checker("xar.tables")
def check_tables(fixture: Fixture):
    out, config = fixture.outputs, fixture.config
    checked = set()

    def same(assertion, actual, key):
        assertion(actual, out[key], what=key)
        checked.add(key)

    for grid, per_side in config["variants"]:
        name = f"g{grid}k{per_side}"
        whole = (1, grid, grid)
        layout = Layout.of(entity_order(_cells(grid, per_side), whole), (whole,), config["head_dim"], "cpu")
        cos, sin = layout.rope.unbind(dim=-1)
        same(assert_equal, layout.visible, f"{name}/visible")
        same(assert_equal, layout.positions, f"{name}/order")
        same(assert_close, cos.repeat_interleave(2, dim=1), f"{name}/rope_cos")
        same(assert_close, sin.repeat_interleave(2, dim=1), f"{name}/rope_sin")
        at_column_one = layout.slots[1]  # there the angles of the second half are the frequencies
        frequencies = torch.atan2(sin, cos)[at_column_one].chunk(2)[1]
        same(assert_close, frequencies, f"{name}/rope_freqs")
        fed = out[f"{name}/rope_in"]
        same(assert_close, rotate_pairs(fed, layout.rope[: fed.shape[2]]), f"{name}/rope_out")
        checked.add(f"{name}/rope_in")
    for solver, times in TIMES.items():
        for steps in config["steps"]:
            grid_times = torch.tensor(times(steps), dtype=torch.float64)
            same(assert_close, grid_times, f"{solver}_t{steps}")
            same(assert_equal, time_index(grid_times[:-1]), f"{solver}_tint{steps}")
    assert checked == set(out)


def _model(fixture: Fixture) -> XARModel:
    config, weights = fixture.config, fixture.weights
    return XARModel.from_original(
        weights,
        {
            "channels": config["channels"],
            "grid": (config["grid"], config["grid"]),
            "entities": _cells(config["grid"], config["cells_per_side"]),
            "width": config["embed_dim"],
            "encoder_depth": config["encoder_depth"],
            "decoder_depth": config["decoder_depth"],
            "heads": config["num_heads"],
            "classes": len(weights["class_emb.weight"]) - 1,
            "condition_dropout": config["label_drop_prob"],
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    )


@checker("xar.forward")
def check_forward(fixture: Fixture):
    model, inputs, out = _model(fixture).train(), fixture.inputs, fixture.outputs
    layout, entities = model.layout(), model.order.calls
    tokens = rearrange(inputs["latents"], "b c h w -> b (h w) c")
    assert_close(tokens[:, layout.positions].unflatten(1, (entities, -1)), out["cells"], what="cells")
    normal = rearrange(inputs["logit_normal_z"], "(k b) -> b k", k=entities)
    times = logit_normal_times(normal)
    assert_close(rearrange(times, "b k -> (k b)"), out["t"], what="times")
    assert_equal(rearrange(time_index(times), "b k -> (k b)"), out["t_int"], "embedded times")
    condition = model.drop(model.vocabulary.labels(inputs["labels"].tolist()), inputs["label_drop_u"])
    conditions = model.conditions(model.class_rows(condition), time_index(times))
    assert_close(rearrange(conditions, "b k d -> (k b) d"), out["cond"], what="conditions")

    seen = {}
    for key, module in {"model_input": model.z_proj, "encoder": model.encoder_norm, "velocity": model.pred}.items():
        module.register_forward_hook(lambda module, args, output, key=key: seen.update({key: output}))
    noise = inputs["noise"].flatten(1, 2)[:, layout.slots]
    loss = model.loss(condition, tokens, normal, noise)["loss"]
    loss.backward()
    assert_close(loss[None], out["loss"], what="loss")
    for key, value in seen.items():
        assert_close(value, out[key], what=key)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients["class_emb_null"] = gradients["class_emb.weight"][-1:]
    recorded = {key for key in out if key.startswith("grad/")}
    for key in recorded:
        assert_close(gradients[key.removeprefix("grad/")], out[key], what=key)
    assert recorded | set(seen) | {"cells", "t", "t_int", "cond", "loss"} == set(out)


@checker("xar.generate")
@torch.no_grad()
def check_generate(fixture: Fixture):
    model, inputs, out, run = _model(fixture), fixture.inputs, fixture.outputs, fixture.config["sampling"]
    labels, entities, steps = inputs["labels"].tolist(), model.order.calls, run["num_steps"]
    guidance = model.guidance(run["cfg"])
    conditions = [model.vocabulary.labels(labels), model.vocabulary.null(len(labels))][: len(guidance.rows)]
    tape = []
    for k in range(entities):
        tape += [inputs[f"cell{k}/init_noise"], *inputs.get(f"cell{k}/noise", ())]
    canvas = Canvas.blank(model.grid, len(labels), channels=model.config.channels)
    state, layout = model.start(conditions, canvas), model.layout()
    rows = len(labels) * len(conditions)  # without guidance vgen leaves the null half out

    calls, times_fed = [], []

    def velocity(state, canvas, entity, x, t):
        parts = type(model).velocity(model, state, canvas, entity, x, t)
        calls.append((t, parts.flatten(0, 1), state.counters.fed_tokens, layout.ends[state.cached]))
        return parts

    model.velocity = velocity
    model.time_embed.register_forward_pre_hook(lambda module, args: times_fed.append(args[0]))
    finished, weights = [], []
    choice = FlowChoice(substeps=steps, solver=run["sampler"])
    for step, _ in decode(model, state, canvas, model.default_order(), guidance, choice, TapeNoise([], [], tape)):
        finished.append(canvas.values[:, step.targets])
        weights.append(guidance.weights(step)[0])
    del model.velocity
    assert not tape, "noise left over"

    times, velocities, fed, lengths = zip(*calls)
    assert_equal(time_index(torch.tensor(times)), out["t_int"], "embedded times")
    assert_close(torch.tensor(weights), out["cfg_per_cell"], what="guidance")
    per_call = torch.tensor(fed).diff(prepend=torch.zeros(1)) / rows
    assert_equal(per_call, out["tokens_per_call"], "tokens fed")
    assert_equal(torch.tensor(lengths), out["kv_cache_len_after_call"], "cached tokens")
    checked = {"t_int", "cfg_per_cell", "tokens_per_call", "kv_cache_len_after_call", "tokens"}
    for k in range(entities):
        recorded = {"x": finished[k], "v_first": velocities[k * steps], "v_last": velocities[(k + 1) * steps - 1]}
        for name, found in recorded.items():
            expected = out[f"cell{k}/{name}"]
            assert_close(found, expected if name == "x" else expected[:rows], what=f"cell {k}: {name}")
        checked |= {f"cell{k}/{name}" for name in recorded}
        if f"cell{k}/t_fed_first" in out:  # one time a row and entity, all rows of the context first
            expected = rearrange(out[f"cell{k}/t_fed_first"], "(k r) -> k r", k=1 + (k > 0))[:, :rows]
            found = times_fed[k * steps][:, None].expand(-1, rows)
            assert_equal(found, time_index(expected), f"cell {k}: times of the first call")
            checked.add(f"cell{k}/t_fed_first")
    latents = rearrange(canvas.values, "b (h w) c -> b c h w", h=model.grid[1])
    assert_close(latents, out["tokens"], what="latents")
    assert checked == set(out)
