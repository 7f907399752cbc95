"""The native model: cached decoding equals the uncached forward, for every order."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.models.anyorder import SIZES, AnyOrderModel, size_config
from vgen.models.conditions.vocabulary import Vocabulary
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas, Condition

CAPTIONS = ["red apple", "a cat", "the big red cat on a mat"]
ORDERS = [
    "raster",
    "diagonal",
    "neighbor",
    "regions-4",
    "zip-2",
    "blocks-2",
    "random",
    "locality",
    "confidence",
]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.build(CAPTIONS, classes=3)


def tiny(vocabulary, grid=(1, 4, 4), **changes) -> AnyOrderModel:
    torch.manual_seed(0)
    settings = {"width": 64, "content_layers": 2, "query_layers": 2, "heads": 2, "prefix_limit": 10}
    model = AnyOrderModel(len(vocabulary), 32, grid, **{**settings, **changes})
    model.vocabulary = vocabulary
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)  # the head starts at zero, which would make every comparison trivially true
        model.target.normal_()
    return model.eval()


def run(model, vocabulary, order, captions=CAPTIONS, known=None, scale=1.0, samples=None, seed=3):
    """Decodes and returns the canvas, the logits of every position, and the step in which each was decoded."""
    samples = torch.arange(len(captions)) if samples is None else samples
    canvas = Canvas.blank(model.grid, samples)
    if known is not None:
        canvas.values, canvas.known = known[0].clone(), known[1].clone()
    guidance = ClassifierFree(scale)
    conditions = [vocabulary.captions(captions, 10), vocabulary.null(len(captions))][: len(guidance.rows)]
    state = model.start(conditions, canvas)
    logits = torch.zeros(len(guidance.rows), *canvas.values.shape, model.config.codes)
    step_ids = torch.where(canvas.known, -1, 0)
    original = model.predict

    def predict(state, step, canvas):
        prediction = original(state, step, canvas)
        targets = step.targets.expand(canvas.batch, -1)
        for part in range(len(guidance.rows)):
            logits[part].scatter_(1, targets[..., None].expand(-1, -1, model.config.codes), prediction.logits[part])
        return prediction

    model.predict = predict
    try:
        for step, _ in decode(model, state, canvas, order, guidance, TokenChoice(), PhiloxNoise(seed, samples)):
            step_ids.scatter_(1, canvas.fresh, step.index)
    finally:
        del model.predict
    return canvas, logits, step_ids, state


@pytest.mark.parametrize("name", ORDERS)
@torch.no_grad()
def test_cached_decoding_equals_the_uncached_forward(vocabulary, name):
    model = tiny(vocabulary)
    order = make_order(name, model.grid)
    canvas, logits, step_ids, state = run(model, vocabulary, order, scale=2.0)
    assert canvas.known.all() and state.counters.calls == order.calls
    for part, condition in enumerate((vocabulary.captions(CAPTIONS, 10), vocabulary.null(3))):
        expected = model(condition, canvas.values, step_ids)
        assert (logits[part] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["raster", "random", "confidence"])
@torch.no_grad()
def test_known_tokens_stay_and_are_context(vocabulary, name):
    model = tiny(vocabulary)
    values = torch.randint(0, 32, (3, 16))
    known = torch.zeros(3, 16, dtype=torch.bool)
    known[:, 4:9] = True
    canvas, logits, step_ids, _ = run(model, vocabulary, make_order(name, model.grid), known=(values, known))
    assert torch.equal(canvas.values[:, 4:9], values[:, 4:9])
    expected = model(vocabulary.captions(CAPTIONS, 10), canvas.values, step_ids)
    assert (logits[0] - expected)[~known].abs().max() < 1e-4


@pytest.mark.parametrize("name", ["raster", "random", "locality", "confidence"])
def test_a_sample_does_not_depend_on_its_batch(vocabulary, name):
    model = tiny(vocabulary)
    captions = [CAPTIONS[i % 3] for i in range(16)]
    order = make_order(name, model.grid)
    together = run(model, vocabulary, order, captions, scale=2.0)[0].values
    alone = [
        run(model, vocabulary, order, [caption], scale=2.0, samples=torch.tensor([i]))[0].values
        for i, caption in enumerate(captions)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_video_grid_and_frames_order(vocabulary):
    model = tiny(vocabulary, grid=(2, 3, 4))
    for name in ("frames", "neighbor", "raster"):
        order = make_order(name, model.grid)
        canvas, logits, step_ids, _ = run(model, vocabulary, order)
        with torch.no_grad():
            expected = model(vocabulary.captions(CAPTIONS, 10), canvas.values, step_ids)
        assert (logits[0] - expected).abs().max() < 1e-4


def test_targets_do_not_see_their_own_step_or_later(vocabulary):
    """Changing a token changes only the logits of later steps."""
    model = tiny(vocabulary)
    condition = vocabulary.captions(CAPTIONS, 10)
    tokens = torch.randint(0, 32, (3, 16))
    step_ids = torch.rand(3, 16).argsort(dim=1) // 3
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 32
    with torch.no_grad():
        difference = (model(condition, tokens, step_ids) - model(condition, changed, step_ids)).abs().amax(dim=-1)
    later = step_ids > step_ids[:, 7:8]
    assert (difference[~later] == 0).all() and (difference[later] > 0).all()


def test_padding_of_other_prompts_changes_nothing(vocabulary):
    model = tiny(vocabulary)
    tokens, step_ids = torch.randint(0, 32, (1, 16)), torch.arange(16)[None]
    short = vocabulary.captions(["a cat"], 10)
    padded = vocabulary.captions(["a cat", "the big red cat on a mat"], 10)
    with torch.no_grad():
        alone = model(short, tokens, step_ids)
        together = model(padded, tokens.repeat(2, 1), step_ids.repeat(2, 1))[:1]
    assert (alone - together).abs().max() < 1e-5


def test_flex_attention_masks_equal_the_dense_ones():
    from torch.nn.attention.flex_attention import flex_attention

    from vgen.layers.attention import StepCausal, attend

    torch.manual_seed(0)
    prefix = torch.tensor([[True, True, False], [True, True, True]])
    mask = StepCausal.build(prefix, torch.randint(-1, 4, (2, 13)))
    query, key, value = torch.randn(3, 2, 2, 16, 32)
    dense = attend(query, key, value, mask.content_dense())
    assert (flex_attention(query, key, value, block_mask=mask.content_blocks()) - dense).abs().max() < 1e-5
    dense = attend(query[:, :, 3:], key, value, mask.query_dense())
    assert (flex_attention(query[:, :, 3:], key, value, block_mask=mask.query_blocks()) - dense).abs().max() < 1e-5


def test_explicit_attention_equals_the_fused_kernel():
    from vgen.layers.attention import attend

    query, key, value = torch.randn(3, 2, 2, 9, 32)
    mask = torch.rand(2, 1, 9, 9) > 0.4
    mask[..., 0] = True
    with torch.no_grad():
        fused = attend(query, key, value, mask)
    assert (attend(query, key, value, mask) - fused).abs().max() < 1e-5


def test_loss_starts_at_ln_codes_and_ignores_given_context(vocabulary):
    model = AnyOrderModel(len(vocabulary), 32, (1, 4, 4), width=64, heads=2, content_layers=1, query_layers=1)
    condition = vocabulary.captions(CAPTIONS, 10)
    tokens, step_ids = torch.randint(0, 32, (3, 16)), torch.arange(16).expand(3, -1)
    assert model.loss(condition, tokens, step_ids)["loss"].item() == pytest.approx(torch.tensor(32.0).log().item())
    model = tiny(vocabulary)
    part = torch.where(step_ids < 8, -1, step_ids)
    logits = model(condition, tokens, part)
    expected = torch.nn.functional.cross_entropy(logits[:, 8:].flatten(0, 1), tokens[:, 8:].flatten())
    assert model.loss(condition, tokens, part)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_bf16_autocast_stays_close_to_fp32(vocabulary):
    """Bound: mean absolute difference of the logits below 3 % of their spread."""
    model = tiny(vocabulary)
    condition, tokens = vocabulary.captions(CAPTIONS, 10), torch.randint(0, 32, (3, 16))
    step_ids = torch.arange(16).expand(3, -1)
    with torch.no_grad():
        exact = model(condition, tokens, step_ids)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(condition, tokens, step_ids).float()
    assert (exact - rounded).abs().mean() < 0.03 * exact.std()


def test_save_and_load(vocabulary, tmp_path):
    model = tiny(vocabulary)
    model.save_pretrained(tmp_path)
    loaded = AnyOrderModel.from_pretrained(tmp_path).eval()
    assert loaded.vocabulary.words == vocabulary.words and loaded.grid == model.grid
    condition, tokens = vocabulary.captions(CAPTIONS, 10), torch.randint(0, 32, (3, 16))
    step_ids = torch.arange(16).expand(3, -1)
    with torch.no_grad():
        assert torch.equal(model(condition, tokens, step_ids), loaded(condition, tokens, step_ids))


@pytest.mark.parametrize("size", SIZES)
def test_every_size_builds(size):
    with torch.device("meta"):
        model = AnyOrderModel(1000, 1024, **size_config(size))
    assert sum(p.numel() for p in model.parameters()) > 3e6


def test_bad_input_is_one_sentence(vocabulary):
    with pytest.raises(VgenError, match="head size that is a multiple of 32, got 20"):
        AnyOrderModel(10, 10, width=40, heads=2)
    with pytest.raises(VgenError, match="did you mean 'XS'"):
        size_config("XSS")
    with pytest.raises(VgenError, match=r"'appple'.*did you mean 'apple'"):
        vocabulary.captions(["red appple"], 10)
    with pytest.raises(VgenError, match="at most 3"):
        vocabulary.captions(["the big red cat"], 4)
    with pytest.raises(VgenError, match="0 to 2, got 3"):
        vocabulary.labels([3])


def test_prefixes(vocabulary):
    condition = vocabulary.captions(["red apple", "a"], 10)
    assert condition.mask.tolist() == [[True, True, True], [True, True, False]]
    assert condition.ids[0, 2] == vocabulary.start and condition.ids[1, 1] == vocabulary.start
    assert vocabulary.null(2).ids.tolist() == [[vocabulary.start]] * 2
    assert vocabulary.labels([0, 2]).ids.shape == (2, 2)
    assert vocabulary.captions(["red unicorn"], 10, strict=False).ids[0, 1] == vocabulary.unknown
    assert isinstance(condition, Condition)
