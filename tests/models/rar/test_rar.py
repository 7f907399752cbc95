"""RAR: cached decoding in any order equals the uncached forward; annealing; files; bad input."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.models.rar.rar import RARModel, draw_orders, random_share, size_config
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas, Condition

TINY = {"codes": 19, "classes": 5, "grid": (3, 4), "width": 32, "layers": 2, "heads": 4, "hidden": 48}


def tiny(**changes) -> RARModel:
    torch.manual_seed(0)
    model = RARModel(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)  # modulations start at zero, which would make every comparison trivially true
    return model.eval()


def run(model, labels, order, scale=1.0, known=None, samples=None, seed=1):
    """The filled canvas, the logits [R, B, L, V] by decode index, and the state."""
    samples = torch.arange(len(labels)) if samples is None else samples
    canvas = Canvas.blank(model.grid, samples)
    if known is not None:
        canvas.values, canvas.known = known[0].clone(), known[1].clone()
    guidance = ClassifierFree(scale, "power-cosine", 2.0)
    condition = model.vocabulary.labels(labels)
    state = model.start([condition, model.null(condition)][: len(guidance.rows)], canvas)
    logits, order_of = [], []
    predict = model.predict

    def spy(*args):
        prediction = predict(*args)
        logits.append(prediction.logits)
        return prediction

    model.predict = spy
    try:
        for _ in decode(model, state, canvas, order, guidance, TokenChoice(), PhiloxNoise(seed, samples)):
            order_of.append(canvas.fresh)
    finally:
        del model.predict
    return canvas, torch.cat(logits, dim=2), torch.cat(order_of, dim=1), state


@pytest.mark.parametrize("name", ["raster", "diagonal", "random:steps=12"])
@torch.no_grad()
def test_cached_decoding_equals_the_uncached_forward(name):
    model = tiny()
    order = make_order(name, model.grid)
    model.check_order(order)
    canvas, logits, positions, state = run(model, [0, 3, 4], order, scale=3.0)
    sequence = canvas.values.gather(1, positions)
    for part, condition in enumerate((model.vocabulary.labels([0, 3, 4]), model.vocabulary.null(3))):
        expected = model(condition, sequence, positions)[:, :-1]
        torch.testing.assert_close(logits[part], expected, atol=1e-4, rtol=1e-4)
    assert (state.counters.calls, state.counters.call_rows, state.counters.fed_tokens) == (12, 72, 6 * 13)


@torch.no_grad()
def test_known_tokens_enter_before_the_rest():
    model = tiny()
    values = torch.randint(TINY["codes"], (2, 12), generator=torch.Generator().manual_seed(1))
    known = torch.zeros(2, 12, dtype=torch.bool)
    known[0, [1, 5, 7]] = known[1, [0, 2, 11]] = True
    canvas, logits, positions, state = run(model, [1, 2], make_order("raster", model.grid), known=(values, known))
    assert torch.equal(canvas.values[known], values[known]) and state.counters.calls == 9
    whole = torch.cat((known.nonzero()[:, 1].view(2, 3), positions), dim=1)
    expected = model(model.vocabulary.labels([1, 2]), canvas.values.gather(1, whole), whole)[:, 3:-1]
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_picture_depends_on_its_sample_only():
    model, order = tiny(), make_order("raster", (3, 4))
    together = run(model, [0, 1, 2], order, scale=2.0)[0].values
    alone = run(model, [1], order, scale=2.0, samples=torch.tensor([1]))[0].values
    assert torch.equal(together[1:2], alone)


@torch.no_grad()
def test_the_target_position_matters():
    model = tiny()
    tokens = torch.randint(TINY["codes"], (1, 12))
    condition = model.vocabulary.labels([0])
    raster, swapped = torch.arange(12)[None], torch.tensor([[*range(10), 11, 10]])
    same, moved = model(condition, tokens, raster), model(condition, tokens, swapped)
    torch.testing.assert_close(same[:, :10], moved[:, :10])
    assert not torch.allclose(same[:, 10], moved[:, 10]), "the slot before knows which position comes next"


def test_random_orders_anneal_to_raster():
    shares = [random_share(progress) for progress in (0, 0.5, 0.6, 0.625, 0.75, 1)]
    assert shares == pytest.approx([1, 1, 0.6, 0.5, 0, 0])
    assert [random_share(p, 0.3, 0.3) for p in (0.2, 0.3, 0.4)] == [1, 0, 0]
    generator = torch.Generator().manual_seed(0)
    raster = torch.arange(12).expand(64, -1)
    assert torch.equal(draw_orders(64, 12, 0.0, generator), raster)
    orders = draw_orders(64, 12, 1.0, generator)
    assert torch.equal(orders.sort(dim=1).values, raster) and not (orders == raster).all(dim=1).any()
    half = (draw_orders(2000, 12, 0.5, generator) == torch.arange(12)).all(dim=1).float().mean()
    assert 0.45 < half < 0.55
    with pytest.raises(VgenError, match=r"within 0\.\.1"):
        random_share(0.1, 0.9, 0.5)


def test_loss_starts_at_the_entropy_of_the_codes_and_trains_every_parameter():
    torch.manual_seed(0)
    model = RARModel(**TINY).train()
    tokens = torch.randint(TINY["codes"], (4, 12))
    condition = model.drop(model.vocabulary.labels([0, 1, 2, 3]), torch.tensor([0.05, 0.5, 0.05, 0.5]))
    assert condition.ids.flatten().tolist() == [5, 1, 5, 3]
    orders = draw_orders(4, 12, 1.0)
    loss = model.loss(condition, tokens, orders)["loss"]
    assert abs(loss.item() - torch.tensor(19.0).log().item()) < 0.1
    tiny_model = tiny().train()
    tiny_model.loss(condition, tokens, orders)["loss"].backward()
    assert [name for name, p in tiny_model.named_parameters() if p.grad is None] == []
    assert not torch.equal(*(tiny_model.loss(condition, tokens, orders)["loss"] for _ in range(2))), "dropout is on"
    tiny_model.enable_gradient_checkpointing()
    tiny_model.eval()
    first = tiny_model.loss(condition, tokens, orders)["loss"]
    torch.testing.assert_close(first, tiny_model.train(False).loss(condition, tokens, orders)["loss"])


@torch.no_grad()
def test_saved_models_come_back(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = RARModel.from_pretrained(tmp_path).eval()
    tokens = torch.randint(TINY["codes"], (1, 12))
    condition = model.vocabulary.labels([2])
    assert torch.equal(model(condition, tokens), again(condition, tokens)) and again.grid == (1, 3, 4)


@torch.no_grad()
def test_original_files_load_and_wrong_ones_are_refused(tmp_path):
    model = tiny()
    path = tmp_path / "rar.bin"
    torch.save(model.state_dict(), path)
    loaded = RARModel.from_single_file(path, TINY)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    with pytest.raises(VgenError, match="does not fit RARModel"):
        RARModel.from_single_file(path, {**TINY, "width": 64})
    with pytest.raises(VgenError, match="unknown RAR size 'BB'"):
        RARModel.from_single_file(path, "BB")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(VgenError, match="cut off"):
        RARModel.from_single_file(path, TINY)
    assert size_config("xl") == size_config("XL")


def test_bad_input_is_one_sentence():
    model = tiny()
    with pytest.raises(VgenError, match="0 to 4, got 5"):
        model.vocabulary.labels([5])
    with pytest.raises(VgenError, match="no words"):
        model.vocabulary.captions(["red apple"])
    with pytest.raises(VgenError, match="got 0 to 6"):
        model.start(
            [Condition(torch.tensor([[0], [6]]), torch.ones(2, 1, dtype=torch.bool))], Canvas.blank((1, 3, 4), 2)
        )
    with pytest.raises(VgenError, match="12 tokens a picture"):
        model.start([model.vocabulary.labels([0])], Canvas.blank((1, 4, 4), 1))
    neighbor = make_order("neighbor", model.grid)
    with pytest.raises(VgenError, match="one token a call"):
        model.check_order(neighbor)
    with pytest.raises(VgenError, match="one token a call"):
        run(model, [0], neighbor)
    with pytest.raises(VgenError, match="multiple of the 3 heads"):
        tiny(heads=3)
