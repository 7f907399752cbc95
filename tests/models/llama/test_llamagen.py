"""LlamaGen: cached decoding equals the forward, ZipAR as an order, conditions, files."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.models.conditions.t5 import left_pad, text_condition
from vgen.models.llama.backbone import SIZES, size_config
from vgen.models.llama.llamagen import LlamaGenModel
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas

TINY = {"codes": 32, "grid": (1, 4, 4), "width": 32, "depth": 2, "heads": 2, "hidden": 64, "classes": 5}
TEXT = {"conditioning": "text", "caption_width": 6, "caption_tokens": 5}


def tiny(kind=LlamaGenModel, **changes):
    torch.manual_seed(0)
    model = kind(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)  # the head starts at zero, which would make every comparison trivially true
    return model.eval()


def captions(lengths=(5, 2, 3)):
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(1)
    return text_condition(*left_pad(torch.randn(len(lengths), 5, 6, generator=generator), mask))


def condition_of(model):
    return captions() if model.vocabulary is None else model.vocabulary.labels([3, 1, 4])


def run(model, order, scale=2.0, known=None, seed=3, samples=(0, 1, 2), condition=None):
    """Decodes: canvas, logits of every position [R, B, N, V], state."""
    condition = condition_of(model) if condition is None else condition
    guidance = model.guidance(scale)
    conditions = [condition, model.null(condition)][: len(guidance.rows)]
    canvas = Canvas.blank(order.grid, torch.tensor(samples))
    if known is not None:
        canvas.values, canvas.known = known[0].clone(), known[1].clone()
    state = model.start(conditions, canvas)
    logits = torch.zeros(len(conditions), *canvas.values.shape, model.config.codes)
    original = model.predict

    def predict(state, step, canvas):
        prediction = original(state, step, canvas)
        logits[:, :, step.targets] = prediction.logits
        return prediction

    model.predict = predict
    try:
        for _ in decode(model, state, canvas, order, guidance, TokenChoice(), PhiloxNoise(seed, canvas.samples)):
            pass
    finally:
        del model.predict
    assert canvas.known.all()
    return canvas, logits, state


def assert_decoding_equals_forward(model, order=None):
    order = order or model.default_order()
    canvas, logits, state = run(model, order)
    assert state.counters.calls == order.calls
    condition = condition_of(model)
    with torch.no_grad():
        for part, row in enumerate((condition, model.null(condition))):
            assert (logits[part] - model(row, canvas.values)).abs().max() < 1e-4


def assert_loss_falls_to_the_forward(model):
    """loss() is the mean cross-entropy of forward(), and reaches every parameter."""
    condition, tokens = condition_of(model), torch.randint(0, 32, (3, 16))
    logits = model(condition, tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    found = model.loss(condition, tokens)
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    found["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def assert_saves_and_loads(model, folder):
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    condition, tokens = condition_of(model), torch.randint(0, 32, (3, 16))
    with torch.no_grad():
        assert torch.equal(model(condition, tokens), loaded(condition, tokens))
    again = type(model).from_single_file(model.state_dict(), dict(model.config))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("changes", [{}, TEXT, {**TEXT, "prefix_tokens": 3}], ids=["class", "text", "cut-text"])
def test_cached_decoding_equals_the_uncached_forward(changes):
    assert_decoding_equals_forward(tiny(**changes))


def test_zip_with_a_full_window_is_raster():
    model = tiny()
    raster = run(model, make_order("raster", model.grid))[0].values
    for faithful in (False, True):
        order = make_order("zip", model.grid, window=4, faithful=faithful)
        assert_decoding_equals_forward(model, order)
        assert torch.equal(run(model, order)[0].values, raster)


def test_zip_sees_only_what_is_there():
    """Slots without a token take no part: whatever lies in the cache there, the logits stay. The release shows zeros."""
    model = tiny(grid=(1, 5, 5))
    order = make_order("zip-2", model.grid)
    assert order.calls == 5 + 4 * 2
    clean = run(model, order)[1]
    original = model.start

    def dirty(conditions, canvas):
        state = original(conditions, canvas)
        state.cache.keys.normal_()
        state.cache.values.normal_()
        return state

    model.start = dirty
    assert (run(model, order)[1] - clean).abs().max() < 1e-5
    faithful = make_order("zip", model.grid, window=2, faithful=True)
    changed = run(model, faithful)[1]
    del model.start
    assert (run(model, faithful)[1] - changed).abs().max() > 1e-2


def test_zip_refreshes_row_ends():
    """Once a row is complete, every slot of the cache holds what raster order would have put there to feed."""
    model = tiny()
    fed = {}
    for step in make_order("zip-1", model.grid).steps(Canvas.blank(model.grid, 1)):
        fed.update(zip(step.feed.slot.tolist(), step.feed.source.tolist()))
        assert (step.feed.slot[step.feed.reads] == step.targets - 1).all()
    assert all(slot == source for slot, source in fed.items())
    assert set(fed) == set(range(-1, 15))


def test_known_tokens_stay_and_are_context():
    model = tiny()
    values = torch.randint(0, 32, (1, 16)).expand(3, -1)
    known = torch.zeros(3, 16, dtype=torch.bool)
    known[:, [0, 1, 5, 6, 15]] = True
    canvas, logits, _ = run(model, make_order("raster", model.grid), known=(values, known))
    assert torch.equal(canvas.values[known], values[known])
    with torch.no_grad():
        expected = model(condition_of(model), canvas.values)
    assert (logits[0] - expected)[~known].abs().max() < 1e-4


def test_a_sample_does_not_depend_on_its_batch():
    model = tiny()
    order = make_order("zip-2", model.grid)
    together = run(model, order)[0].values
    for i, label in enumerate([3, 1, 4]):
        alone = run(model, order, samples=(i,), condition=model.vocabulary.labels([label]))[0].values
        assert torch.equal(alone, together[i : i + 1])


def test_padding_of_the_prompt_takes_no_part():
    model = tiny(**TEXT)
    tokens = torch.randint(0, 32, (3, 16))
    condition = captions()
    noisy = condition.extras["features"] + 9.0 * ~condition.mask[..., None]
    with torch.no_grad():
        clean, changed = model(condition, tokens), model(text_condition(noisy, condition.mask), tokens)
    assert (clean - changed).abs().max() < 1e-5


def test_null_and_dropped_conditions():
    model = tiny()
    condition = model.drop(model.vocabulary.labels([3, 1]), torch.tensor([0.05, 0.5]))
    assert condition.ids.tolist() == [[5], [1]]
    text = tiny(**TEXT)
    null = text.null(captions())
    assert torch.equal(null.mask, captions().mask), "the null caption keeps the mask of the prompt"
    assert torch.equal(null.extras["features"][1], text.cls_embedding.uncond_embedding)
    assert not any("uncond" in name for name, _ in text.named_parameters())


def test_guidance_interval():
    model = tiny()
    order = make_order("raster", model.grid)
    weights = [model.guidance(3.0, 4).weights(step) for step in order.steps(Canvas.blank(model.grid, 1))]
    assert weights == [(3.0, -2.0)] * 6 + [(1.0, 0.0)] * 10


@pytest.mark.parametrize("changes", [{}, TEXT], ids=["class", "text"])
def test_loss(changes):
    model = tiny(**changes)
    assert_loss_falls_to_the_forward(model)
    tokens, valid = torch.randint(0, 32, (3, 16)), torch.tensor([1, 0, 1])
    kept = torch.tensor([0, 2])
    condition = condition_of(model)
    logits = model(condition, tokens)
    expected = torch.nn.functional.cross_entropy(logits[kept].flatten(0, 1), tokens[kept].flatten())
    assert model.loss(condition, tokens, valid)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_first_loss_is_ln_codes():
    model = LlamaGenModel(**TINY).eval()
    loss = model.loss(model.vocabulary.labels([0]), torch.zeros(1, 16, dtype=torch.long))["loss"]
    assert loss.item() == pytest.approx(torch.tensor(32.0).log().item())


@pytest.mark.parametrize("changes", [{}, TEXT], ids=["class", "text"])
def test_save_and_load(changes, tmp_path):
    assert_saves_and_loads(tiny(**changes), tmp_path)


def test_nested_files_and_computed_buffers(tmp_path):
    model = tiny()
    state = {**model.state_dict(), "freqs_cis": torch.zeros(3), "layers.0.attention.kv_cache.k_cache": torch.zeros(2)}
    torch.save({"model": state, "steps": 3}, tmp_path / "c2i.pt")
    loaded = LlamaGenModel.from_original(tmp_path / "c2i.pt", TINY)
    assert torch.equal(loaded.output.weight, model.output.weight)


def test_bad_input_is_one_sentence():
    model = tiny()
    with pytest.raises(VgenError, match="raster or zip"):
        run(model, make_order("random", model.grid))
    with pytest.raises(VgenError, match="'neighbor'"):
        model.check_order(make_order("neighbor", model.grid))
    with pytest.raises(VgenError, match="0 to 4, got 5"):
        model.vocabulary.labels([5])
    with pytest.raises(VgenError, match="does not fit LlamaGenModel"):
        LlamaGenModel.from_original(model.state_dict(), {**TINY, "depth": 3})
    foreign = {**model.state_dict(), "medusa_output.weight": torch.zeros(1)}
    with pytest.raises(VgenError, match="a NAR checkpoint, expected LlamaGen"):
        LlamaGenModel.from_original(foreign, TINY)
    with pytest.raises(VgenError, match="did you mean 'XXXL'"):
        size_config("XXXXL")
    with pytest.raises(VgenError, match="multiple of 4, got 5"):
        LlamaGenModel(width=10, heads=2)
    with pytest.raises(VgenError, match="caption features"):
        tiny(**TEXT).start([model.vocabulary.labels([0])], Canvas.blank(model.grid, 1))
    with pytest.raises(VgenError, match="without dropping conditions"):
        tiny(condition_dropout=0.0).null(model.vocabulary.labels([0]))
    with pytest.raises(VgenError, match="makes pictures"):
        LlamaGenModel(grid=(2, 4, 4))


@pytest.mark.parametrize("size", SIZES)
def test_every_size_builds(size):
    with torch.device("meta"):
        assert sum(p.numel() for p in LlamaGenModel.of_size(size).parameters()) > 1e8
