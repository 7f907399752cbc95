"""xAR: entities, the cache, causality, guidance, continuation of pictures, files, bad input."""

import math

import pytest
import torch
from conftest import assert_same_weights

from vgen.errors import VgenError
from vgen.models.conditions.vocabulary import Vocabulary
from vgen.models.xar.entities import Layout, entity_order, with_scales
from vgen.models.xar.xar import XARModel, size_config, time_index
from vgen.samplers.choice import FlowChoice
from vgen.samplers.decode import decode
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas

SMALL = {
    **{"channels": 3, "grid": (4, 4), "entities": "blocks-2", "width": 24, "heads": 3, "classes": 5},
    **{"encoder_depth": 2, "decoder_depth": 1, "dropout": 0.0, "attention_dropout": 0.0},
}
# entities and grid -> their sizes in sequence order
ENTITIES = {
    ("blocks-2", (4, 4)): [4] * 4,
    ("blocks-1x3", (4, 6)): [3] * 8,
    ("raster", (2, 3)): [1] * 6,
    ("subsample-2", (4, 6)): [6] * 4,
    ("blocks-4", (4, 4)): [16],
    ("scales", (4, 4)): [1, 4, 16],
    ("scales", (4, 6)): [6, 24],
}
CASES = pytest.mark.parametrize("entities, grid", ENTITIES)


def build(**changes):
    torch.manual_seed(0)
    model = XARModel(**{**SMALL, **changes})
    with torch.no_grad():
        for norm in (model.z_proj_ln, model.encoder_norm, model.decoder_norm):
            norm.weight.normal_(1.0, 0.3)
    return model.eval()


def run(model, scale=2.0, labels=(0, 1, 4), samples=None, known=None, choice=None, order=None):
    """The filled canvas and the state."""
    samples = torch.arange(len(labels)) if samples is None else samples
    canvas = Canvas.blank(model.grids, samples, channels=3)
    if known is not None:
        canvas.values, canvas.known = (part.clone() for part in known)
    guidance, condition = model.guidance(scale), model.vocabulary.labels(labels)
    state = model.start([condition, model.null(condition)][: len(guidance.rows)], canvas)
    choice = FlowChoice(substeps=3, solver="sde") if choice is None else choice
    order = model.order if order is None else order
    for _ in decode(model, state, canvas, order, guidance, choice, PhiloxNoise(3, samples)):
        pass
    return canvas, state


# ---------------------------------------------------------------- entities


@CASES
def test_entities_cut_the_sequence(entities, grid):
    model = build(entities=entities, grid=grid)
    layout = model.layout()
    assert torch.tensor(layout.ends).diff().tolist() == ENTITIES[entities, grid]
    assert torch.equal(layout.positions[layout.slots], torch.arange(layout.ends[-1]))
    assert model.encoder_pos_embed_learned.shape[1] == layout.ends[-1]


def test_a_subsample_is_a_lattice_and_a_cell_a_square():
    lattice, cells = (entity_order(name, (1, 4, 4)).groups() for name in ("subsample-2", "blocks-2"))
    assert [group.tolist() for group in lattice][1:3] == [[1, 3, 9, 11], [4, 6, 12, 14]]
    assert [group.tolist() for group in cells][1:3] == [[2, 3, 6, 7], [8, 9, 12, 13]]


def test_scales_are_means_at_the_centres_of_what_they_cover():
    tokens = torch.arange(16.0).view(1, 16, 1)
    scales = with_scales(tokens, ((1, 1, 1), (1, 2, 2), (1, 4, 4)))
    assert scales.flatten()[:5].tolist() == [7.5, 2.5, 4.5, 10.5, 12.5]
    assert torch.equal(scales[:, 5:], tokens)
    grids = ((1, 1, 1), (1, 2, 2), (1, 4, 4))
    order = entity_order("scales", (1, 4, 4))
    rope = Layout.of(order, grids, 8, "cpu").rope
    rows, columns = torch.atan2(rope[..., 1], rope[..., 0])[:, ::2].unbind(dim=1)  # the pairs with frequency 1
    assert torch.allclose(rows[:5], torch.tensor([1.5, 0.5, 0.5, 2.5, 2.5]))
    assert torch.allclose(columns[1:9], torch.tensor([0.5, 2.5, 0.5, 2.5, 0.0, 1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    "entities, message",
    [
        ("blocks-3", "groups of 9 and 3 and 1 tokens; cells that divide it are 1, 2 or 4 tokens high"),
        ("subsample-3", "4x4 grid into groups of 4 and 2 and 1"),
        ("regions-4", "equally large"),
        ("random", "the order 'random' is not"),
        ("cells-2", "unknown order 'cells'"),
    ],
)
def test_entities_that_do_not_fit(entities, message):
    with pytest.raises(VgenError, match=message):
        XARModel(**{**SMALL, "entities": entities})


# ---------------------------------------------------------------- the network


def test_times_are_cut_off_in_fp32():
    times = torch.tensor([1.0, 0.0, 0.9754545454545455, 0.29, 0.0399])
    assert time_index(times).tolist() == [1000, 0, 975, 290, 39]
    assert time_index(torch.tensor(0.9999)).item() == 999


@CASES
def test_an_entity_sees_itself_and_what_came_before(entities, grid):
    model = build(entities=entities, grid=grid)
    layout, condition = model.layout(), model.vocabulary.labels([2])
    tokens = torch.randn(1, layout.ends[-1], 3)
    times = torch.rand(1, len(layout.ends) - 1)
    before = model(condition, tokens, times)[:, layout.positions]
    for start, stop in zip(layout.ends, layout.ends[1:]):
        changed = tokens.clone()
        changed[:, layout.positions[stop - 1]] += 1.0
        moved = (model(condition, changed, times)[:, layout.positions] - before).abs().amax(dim=-1)[0]
        assert (moved[:start] == 0).all()
        assert (moved[start:] > 0).all(), "it and what follows depend on it"


@CASES
def test_cached_velocities_equal_uncached_ones(entities, grid):
    model = build(entities=entities, grid=grid)
    layout = model.layout()
    compared = []

    def velocity(state, canvas, entity, x, t):
        found = XARModel.velocity(model, state, canvas, entity, x, t)
        start, stop = layout.ends[entity], layout.ends[entity + 1]
        whole = torch.cat((canvas.values[:, layout.positions[:start]], x), dim=1).repeat(state.rows, 1, 1)
        times = torch.tensor([[0] * entity + [int(1000 * t)]])
        expected = model.run(whole, model.conditions(state.classes, times), layout, slice(0, stop))[:, start:]
        compared.append((found.flatten(0, 1), expected.detach()))
        return found

    model.velocity = velocity
    _, state = run(model, choice=FlowChoice(substeps=4))
    assert len(compared) == 4 * model.order.calls == state.counters.calls
    for found, expected in compared:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    context = layout.ends[-2]  # every entity but the last one is fed a second time
    assert state.counters.fed_tokens == 6 * (4 * layout.ends[-1] + context)


def test_the_loss_is_the_velocity_of_noisy_entities():
    model = build()
    condition = model.vocabulary.labels([0, 3])
    tokens, noise, normal = torch.randn(2, 16, 3), torch.randn(2, 16, 3), torch.randn(2, 4)
    seen = []
    model.z_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss = model.loss(condition, tokens, normal, noise)["loss"]
    times = normal.sigmoid()[:, model.order.step_ids()][..., None]
    fed = ((1 - times) * tokens + times * noise)[:, model.layout().positions]
    torch.testing.assert_close(seen[0], fed)
    torch.manual_seed(1)
    again = model.loss(condition, tokens)["loss"]
    torch.manual_seed(1)
    assert torch.equal(again, model.loss(condition, tokens)["loss"]) and not torch.equal(again, loss)


@pytest.mark.parametrize("entities", ["blocks-2", "scales"])
def test_every_parameter_learns_and_the_loss_falls(entities):
    model = build(entities=entities).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens, condition = torch.randn(8, 16, 3), model.vocabulary.labels([0, 1, 2, 3] * 2)
    draws = torch.randn(8, model.order.calls), torch.randn(8, sum(h * w for _, h, w in model.grids), 3)
    first = model.loss(condition, tokens, *draws)["loss"]
    first.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    for _ in range(30):
        optimizer.step()
        optimizer.zero_grad()
        loss = model.loss(condition, tokens, *draws)["loss"]
        loss.backward()
    assert loss < 0.6 * first


def test_gradient_checkpointing_and_dropout():
    model = build(dropout=0.5, attention_dropout=0.5)
    condition, tokens = model.vocabulary.labels([0, 3]), torch.randn(2, 16, 3)
    draws = torch.randn(2, 4), torch.randn(2, 16, 3)
    still = model.loss(condition, tokens, *draws)["loss"]
    losses = {}
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.train().zero_grad()
        torch.manual_seed(2)
        losses[checkpointing] = model.loss(condition, tokens, *draws)["loss"]
        losses[checkpointing].backward()
    assert torch.equal(losses[False], losses[True]) and not torch.equal(losses[True], still)


# ---------------------------------------------------------------- decoding


def test_guidance_grows_with_the_entity():
    model, scales = build(), {}
    for entities in ("blocks-2", "blocks-4"):
        order = entity_order(entities, (1, 4, 4))
        steps = order.steps(Canvas.blank((1, 4, 4), 1))
        scales[entities] = [model.guidance(3.0).weights(step)[0] for step in steps]
    assert scales["blocks-2"] == pytest.approx([1, 5 / 3, 7 / 3, 3]) and scales["blocks-4"] == [3.0]
    assert model.guidance(1).rows == ("cond",)
    first, second = (run(model, scale)[0].values for scale in (1.0, 4.0))
    cell = model.order.groups()[0]
    torch.testing.assert_close(first[:, cell], second[:, cell])  # the first entity is not guided
    assert not torch.allclose(first, second)


@CASES
def test_a_picture_depends_on_its_sample_only(entities, grid):
    model = build(entities=entities, grid=grid)
    together, _ = run(model)
    alone, _ = run(model, labels=(4,), samples=torch.tensor([2]))
    torch.testing.assert_close(together.values[2:], alone.values, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together.values[0], together.values[1])


def test_pictures_are_continued():
    model = build()
    whole, _ = run(model)
    first = torch.cat(model.order.groups()[:2])
    known = torch.zeros(3, 16, dtype=torch.bool)
    known[:, first] = True
    canvas, state = run(model, known=(torch.where(known[..., None], whole.values, 0.0), known))
    assert torch.equal(canvas.values[:, first], whole.values[:, first]) and canvas.known.all()
    assert state.counters.calls == 6 and state.finished == 4
    # Two entities enter with the first call and a third one later, in six rows.
    assert state.counters.fed_tokens == 6 * (8 + 6 * 4 + 4)
    for hole in ([0, 1], [2, 3, 6, 7]):
        known = torch.zeros(3, 16, dtype=torch.bool)
        known[:, hole] = True
        with pytest.raises(VgenError, match="whole entities"):
            run(model, known=(whole.values, known))


def test_captions_may_condition_it():
    model = build(conditioning="words", classes=9)
    model.vocabulary = Vocabulary.build(["red cat", "blue cat", "red dog"])
    condition = model.vocabulary.captions(["red cat", "blue cat"])
    rows = model.class_rows(condition)
    assert rows.shape == (2, 24) and not torch.allclose(rows[0], rows[1])
    dropped = model.drop(condition, torch.tensor([0.0, 0.9]))
    assert torch.equal(model.class_rows(dropped)[0], model.class_rows(model.null(condition))[0])
    assert model.loss(condition, torch.randn(2, 16, 3))["loss"].isfinite()


# ---------------------------------------------------------------- files and bad input


def original(model):
    """The state dict with the tables of the released files."""
    layout = model.layout()
    cos, sin = layout.rope.repeat_interleave(2, dim=1).unbind(dim=-1)
    state = dict(model.state_dict())
    state["mask"] = torch.where(layout.visible, 0.0, -math.inf)[None, None]
    for stack, depth in (("encoder", 2), ("decoder", 1)):
        for block in range(depth):
            for name, table in (("freqs", cos[0]), ("freqs_cos", cos), ("freqs_sin", sin)):
                state[f"{stack}_blocks.{block}.attn.rope.{name}"] = table
    return state


def test_saved_models_come_back_and_original_files_load(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "saved")
    expected, _ = run(model)
    torch.save(original(model), tmp_path / "original.pth")
    for other in (
        XARModel.from_pretrained(tmp_path / "saved"),
        XARModel.from_single_file(tmp_path / "original.pth", SMALL),
        XARModel.from_original(model.state_dict(), SMALL),  # without its tables
    ):
        assert_same_weights(other, model)
        torch.testing.assert_close(run(other.eval())[0].values, expected.values, rtol=1e-4, atol=1e-4)


def test_a_file_of_other_entities_is_refused():
    state = original(build())
    with pytest.raises(VgenError, match="other entities than 'subsample-2'"):
        XARModel.from_original(state, {**SMALL, "entities": "subsample-2"})
    del state["mask"]
    with pytest.raises(VgenError, match="freqs_cos of this file"):
        XARModel.from_original(state, {**SMALL, "entities": "raster"})


def test_bad_input_is_one_sentence():
    model = build()
    with pytest.raises(VgenError, match="unknown xAR size 'XL'"):
        size_config("XL")
    assert size_config("b")["width"] == 768
    with pytest.raises(VgenError, match="multiple of 4"):
        build(heads=4)
    with pytest.raises(VgenError, match="makes pictures"):
        build(grid=(2, 4, 4))
    with pytest.raises(VgenError, match="does not fit XARModel"):
        XARModel.from_original(model.state_dict(), "B")
    with pytest.raises(VgenError, match="at least 1"):
        model.guidance(0.5)
    with pytest.raises(VgenError, match="at least 3 substeps"):
        run(model, choice=FlowChoice(substeps=2, solver="sde"))
    model.check_order(model.default_order())
    raster = make_order("raster", model.grid)
    with pytest.raises(VgenError, match="order blocks-2, got 'raster'"):
        model.check_order(raster)
    with pytest.raises(VgenError, match="asks for 1 tokens in call 0"):
        run(model, order=raster)
    condition = model.vocabulary.labels([0, 1, 2])
    with pytest.raises(VgenError, match="one condition a picture: 2, got 3"):
        model.start([condition, condition], Canvas.blank(model.grid, 2, channels=3))
    with pytest.raises(VgenError, match="4x4 tokens of 3 channels"):
        model.start([condition], Canvas.blank(model.grid, 3, channels=4))
