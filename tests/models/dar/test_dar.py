"""DAR: cached decoding equals the uncached forward, in its own order only; files; bad input."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.models.dar.dar import DARModel, size_config
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas

TINY = {
    "codes": 19,
    "code_channels": 6,
    "classes": 5,
    "grid": (3, 4),
    "width": 32,
    "layers": 2,
    "heads": 2,
    "hidden": 48,
}


def tiny(**changes) -> DARModel:
    torch.manual_seed(0)
    model = DARModel(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)  # modulations and head start at zero
    return model.eval()


def run(model, labels, order=None, scale=1.0, samples=None):
    samples = torch.arange(len(labels)) if samples is None else samples
    canvas = Canvas.blank(model.grid, samples)
    guidance = ClassifierFree(scale, "power-cosine", 2.0)
    condition = model.vocabulary.labels(labels)
    state = model.start([condition, model.null(condition)][: len(guidance.rows)], canvas)
    logits, predict = [], model.predict

    def spy(*args):
        prediction = predict(*args)
        logits.append(prediction.logits)
        return prediction

    model.predict = spy
    order = order or model.default_order()
    try:
        for _ in decode(model, state, canvas, order, guidance, TokenChoice(), PhiloxNoise(2, samples)):
            pass
    finally:
        del model.predict
    return canvas, torch.cat(logits, dim=2), state


@pytest.mark.parametrize("grid, first", [((3, 4), "right"), ((4, 2), "down"), ((1, 5), "right")])
@torch.no_grad()
def test_cached_decoding_equals_the_uncached_forward(grid, first):
    model = tiny(grid=grid, first=first)
    canvas, logits, state = run(model, [0, 4], scale=3.0)
    for part, condition in enumerate((model.vocabulary.labels([0, 4]), model.vocabulary.null(2))):
        torch.testing.assert_close(logits[part], model(condition, canvas.values), atol=1e-4, rtol=1e-4)
    calls = grid[0] * grid[1]
    assert (state.counters.calls, state.counters.fed_tokens) == (calls, 4 * calls)


@torch.no_grad()
def test_a_picture_depends_on_its_sample_only():
    model = tiny()
    together = run(model, [0, 1, 2], scale=2.0)[0].values
    assert torch.equal(together[1:2], run(model, [1], scale=2.0, samples=torch.tensor([1]))[0].values)


@torch.no_grad()
def test_every_token_is_told_its_direction():
    model = tiny()
    condition, tokens = model.vocabulary.labels([1]), torch.randint(TINY["codes"], (1, 12))
    before = model(condition, tokens)
    directions = model.default_order()
    model.dir_emb.weight[2] += 1.0  # down-left
    after = model(condition, tokens)
    first_use = 2  # moves: start, right, down-left, …
    assert directions.positions[:3].tolist() == [0, 1, 4]
    torch.testing.assert_close(before[:, :first_use], after[:, :first_use])
    assert not torch.allclose(before[:, first_use], after[:, first_use])


@torch.no_grad()
def test_other_orders_are_refused():
    model = tiny()
    model.check_order(make_order("diagonal", model.grid))
    for name in ("raster", "neighbor", "diagonal:first=down", "diagonal-oneway"):
        order = make_order(name, model.grid)
        with pytest.raises(VgenError, match="zig-zag"):
            model.check_order(order)
        with pytest.raises(VgenError, match=r"zig-zag|one token a call"):
            run(model, [0], order)


def test_loss_starts_at_the_entropy_of_the_codes_and_trains_all_but_the_codebook():
    torch.manual_seed(0)
    model = DARModel(**TINY)
    tokens = torch.randint(TINY["codes"], (2, 12))
    condition = model.vocabulary.labels([0, 1])
    assert model.loss(condition, tokens)["loss"].item() == pytest.approx(torch.tensor(19.0).log().item(), abs=1e-4)
    model = tiny().train()
    model.loss(condition, tokens)["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert "codebook" in model.state_dict() and "codebook" not in dict(model.named_parameters())
    assert not torch.equal(*(model.loss(condition, tokens)["loss"] for _ in range(2))), "dropout is on"


@torch.no_grad()
def test_the_codebook_comes_from_the_tokenizer():
    model = tiny()
    codebook = torch.randn(19, 6)
    model.load_codebook(codebook)
    assert torch.equal(model.codebook, codebook)
    with pytest.raises(VgenError, match="codebook of"):
        model.load_codebook(torch.randn(19, 5))


@torch.no_grad()
def test_saved_models_come_back(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = DARModel.from_pretrained(tmp_path).eval()
    tokens, condition = torch.randint(TINY["codes"], (1, 12)), model.vocabulary.labels([2])
    assert torch.equal(model(condition, tokens), again(condition, tokens))


def test_sizes_have_the_stated_parameter_counts():
    with torch.device("meta"):
        model = DARModel(**size_config("b"))
    assert sum(p.numel() for p in model.parameters()) + model.codebook.numel() == pytest.approx(484e6, rel=2e-3)
    with torch.device("meta"):
        model = DARModel(**size_config("XL"))
    assert sum(p.numel() for p in model.parameters()) + model.codebook.numel() == pytest.approx(2.075e9, rel=2e-3)


def test_bad_input_is_one_sentence():
    model = tiny()
    with pytest.raises(VgenError, match="multiple of 8"):
        tiny(heads=8)
    with pytest.raises(VgenError, match="one picture"):
        tiny(grid=(2, 3, 4))
    with pytest.raises(VgenError, match="empty canvas"):
        canvas = Canvas.blank(model.grid, 1)
        canvas.known[:, 3] = True
        model.start([model.vocabulary.labels([0])], canvas)
    with pytest.raises(VgenError, match="unknown DAR size"):
        DARModel.from_single_file({}, "XXL")
    with pytest.raises(VgenError, match="does not fit DARModel"):
        DARModel.from_single_file({"blocks.0.qkv.weight": torch.zeros(1)}, TINY)
