"""FlexAR: cached decoding equals the uncached forward, the release's guidance bug on request, prompts, files, bad input."""

import sys
from types import SimpleNamespace

import pytest
import torch

from vgen.errors import VgenError
from vgen.models.conditions.vocabulary import Vocabulary
from vgen.models.flexar.flexar import FlexARModel, file_config, size_config
from vgen.models.flexar.text import Prompts, prompt_condition
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas, Condition

TINY = {"codes": 19, "tokens": 7, "width": 32, "depth": 2, "heads": 2, "hidden": 24, "classes": 4, "text_width": 10}


def tiny(**changes) -> FlexARModel:
    torch.manual_seed(0)
    model = FlexARModel(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def prompts(batch=2, length=5) -> Condition:
    draw = torch.Generator().manual_seed(3)
    features = torch.randn(batch, length, 10, generator=draw)
    mask = torch.arange(length) < torch.tensor([length, 2])[:batch, None]
    return prompt_condition(features, mask, torch.randn(1, 10, generator=draw), torch.ones(1))


def run(model, condition, scale=1.0, known=None, count=None, choice=None, samples=None):
    """Tokens, raw logits [R, B, calls, V], and the state."""
    batch = len(condition.mask)
    grid = (1, 1, count or model.config.tokens)
    canvas = Canvas.blank(grid, torch.arange(batch) if samples is None else samples)
    if known is not None:
        canvas.values, canvas.known = known[0].clone(), known[1].clone()
    guidance = ClassifierFree(scale)
    conditions = [condition, model.null(condition)][: len(guidance.rows)]
    state = model.start(conditions, canvas)
    logits, predict = [], model.predict

    def spy(*args):
        prediction = predict(*args)
        logits.append(prediction.logits)
        return prediction

    model.predict = spy
    order = make_order("raster", grid)
    model.check_order(order)
    for _ in decode(model, state, canvas, order, guidance, choice or TokenChoice(), PhiloxNoise(0, canvas.samples)):
        pass
    del model.predict
    return canvas.values, torch.cat(logits, dim=2), state


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("options", [{}, {"norm": "rms", "qk_norm": False, "positions": False, "post_norm": False}])
def test_cached_decoding_equals_the_forward(kind, options):
    model = tiny(conditioning=kind, **options)
    condition = model.vocabulary.labels([1, 3]) if kind == "class" else prompts()
    tokens, logits, state = run(model, condition, scale=2.0)
    for row, part in zip((condition, model.null(condition)), logits):
        assert torch.allclose(model(row, tokens), part, atol=1e-4)
    assert (state.counters.calls, state.counters.fed_tokens) == (7, 4 * 7)


def test_words_are_one_vector_added_to_the_start():
    words = Vocabulary.build(["red cat", "blue dog"])
    model = tiny(conditioning="words", classes=len(words))
    model.vocabulary = words
    condition = words.captions(["red cat", "dog"])
    tokens, logits, _ = run(model, condition, scale=2.0)
    for row, part in zip((condition, model.null(condition)), logits):
        assert torch.allclose(model(row, tokens), part, atol=1e-4)
    table = model.preprocessor.cls_embedding.weight
    start, _, _ = model.read_condition(condition)
    expected = table[[*words.encode("dog"), words.start]].mean(dim=0)
    assert torch.allclose(start[1], expected, atol=1e-5)  # padding does not count


def test_known_tokens_stay_and_are_seen():
    model, condition = tiny(), None
    condition = model.vocabulary.labels([1, 3])
    values = torch.randint(19, (2, 7), generator=torch.Generator().manual_seed(2))
    known = torch.tensor([True, True, False, True, False, False, True]).expand(2, -1)
    tokens, logits, state = run(model, condition, known=(values, known))
    assert torch.equal(tokens[known], values[known]) and state.counters.calls == 4 - 1
    wanted = model(condition, tokens)[:, [2, 4, 5]]
    assert torch.allclose(logits[0], wanted, atol=1e-4)


def test_a_shorter_canvas_gives_the_first_tokens():
    model = tiny()
    condition = model.vocabulary.labels([1, 3])
    whole, short = run(model, condition)[0], run(model, condition, count=3)[0]
    assert torch.equal(whole[:, :3], short)


def test_samples_do_not_depend_on_the_batch():
    model = tiny()
    both = run(model, model.vocabulary.labels([1, 3]), scale=2.0)[0]
    alone = run(model, model.vocabulary.labels([3]), scale=2.0, samples=torch.tensor([1]))[0]
    assert torch.equal(both[1:], alone)


def test_padding_of_prompts_changes_nothing():
    model = tiny(conditioning="text")
    longer = prompts()
    longer = prompt_condition(
        torch.nn.functional.pad(longer.extras["features"], (0, 0, 0, 4), value=9.0),
        torch.nn.functional.pad(longer.mask, (0, 4)),
        longer.extras["null_features"][0, :1],
        torch.ones(1),
    )
    tokens = torch.zeros(2, 7, dtype=torch.long)
    for ours, padded in ((prompts(), longer), (model.null(prompts()), model.null(longer))):
        assert torch.allclose(model(ours, tokens), model(padded, tokens), atol=1e-5)


def test_the_bug_of_the_release_is_off_unless_asked_for():
    right, faithful = tiny(), tiny(faithful=True)
    condition = right.vocabulary.labels([1, 3])
    greedy = TokenChoice(temperature=0)
    tokens, logits, _ = run(right, condition, scale=3.0, choice=greedy)
    made, bugged, state = run(faithful, condition, scale=3.0, choice=greedy)
    assert torch.equal(logits[:, :, 0], bugged[:, :, 0]), "the first call is right in both"
    zero = right.vocabulary.labels([0, 0])
    assert torch.allclose(bugged[1, :, 1:], right(zero, made)[:, 1:], atol=1e-4)
    assert torch.allclose(bugged[0], right(condition, made), atol=1e-4)
    assert torch.allclose(logits[1], right(right.null(condition), tokens), atol=1e-4)
    assert not torch.allclose(logits[1, :, 1:], right(zero, tokens)[:, 1:], atol=1e-2)
    assert state.counters.fed_tokens == 4 * (7 + 1), "the start is fed twice"
    assert run(faithful, condition, scale=1.0)[2].counters.fed_tokens == 2 * 7, "without guidance there is no bug"


@pytest.mark.parametrize("kind", ["class", "text"])
def test_loss_and_dropped_conditions(kind):
    model = tiny(conditioning=kind)
    condition = model.vocabulary.labels([1, 3]) if kind == "class" else prompts()
    tokens = torch.randint(19, (2, 7))
    found = model.loss(condition, tokens)
    expected = torch.nn.functional.cross_entropy(model(condition, tokens).flatten(0, 1), tokens.flatten())
    assert torch.allclose(found["loss"], expected)
    dropped = model.drop(condition, torch.tensor([0.05, 0.5]))
    mixed, null, kept = (model(c, tokens) for c in (dropped, model.null(condition), condition))
    assert torch.allclose(mixed[0], null[0], atol=1e-5) and torch.allclose(mixed[1], kept[1], atol=1e-5)


def test_prompts_carry_the_features_of_the_empty_prompt():
    class Tokens(dict):
        def to(self, device):
            return self

    def tokenizer(texts, **options):
        ids = [[1] * len(text.split()) + [7] for text in texts]
        if not options:
            return {"input_ids": ids}
        length = max(map(len, ids))
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
        return Tokens(input_ids=mask, attention_mask=mask)

    def encoder(input_ids, attention_mask):
        return {"last_hidden_state": attention_mask[..., None].float() * torch.arange(3.0)}

    encoder.device = "cpu"
    made = Prompts(tokenizer, encoder).captions(["a cat", "a very fat cat"])
    assert made.mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert made.extras["features"].shape == (2, 5, 3) and made.extras["null_mask"].sum() == 2
    with pytest.raises(VgenError, match="a prompt may have 4 tokens"):
        Prompts(tokenizer, encoder).captions(["a very fat cat"], limit=4, strict=True)


# ---------------------------------------------------------------- files


def release(model) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of the release, with parts that load from elsewhere."""
    ours = ("preprocessor.", "trunk.", "head.")
    state = {
        f"models.ar_image_model.{key}"
        if key.startswith(ours)
        else key.replace("text_mlp.", "models.text_encoder.mlp."): value
        for key, value in model.state_dict().items()
    }
    return {**state, "models.image_tokenizer.x": torch.zeros(1), "models.text_encoder.t5_embedder.y": torch.zeros(1)}


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": False, "positions": False, "post_norm": False, "norm_bias": True, "bias": True}]
)
def test_a_file_tells_its_shape(kind, options):
    model = tiny(conditioning=kind, **options)
    config = {"tokens": 7} if options else {}  # without a table nothing tells
    if options:
        config["heads"] = 2
    loaded = FlexARModel.from_original(release(model), config)
    differing = {k for k, v in model.config.items() if loaded.config[k] != v and not k.startswith("_")}
    assert differing <= {"text_width" if kind == "class" else "classes"}
    condition = model.vocabulary.labels([1, 3]) if kind == "class" else prompts()
    tokens = torch.zeros(2, 7, dtype=torch.long)
    assert torch.equal(loaded(condition, tokens), model(condition, tokens))


def test_saved_and_loaded(tmp_path):
    model = tiny(faithful=True)
    model.save_pretrained(tmp_path)
    loaded = FlexARModel.from_pretrained(tmp_path)
    assert loaded.config.faithful and torch.equal(
        run(loaded, loaded.vocabulary.labels([2]))[0], run(model, model.vocabulary.labels([2]))[0]
    )


def test_wrong_files():
    with pytest.raises(VgenError, match="no FlexAR checkpoint"):
        FlexARModel.from_original({"layers.0.weight": torch.zeros(1)})
    with pytest.raises(VgenError, match="does not fit FlexARModel"):
        FlexARModel.from_original(release(tiny()), "113M")
    with pytest.raises(VgenError, match="did you mean '113M'"):
        size_config("113")
    assert size_config(None) == {} and file_config(tiny().state_dict())["depth"] == 2


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tiny(heads=3), "multiple of the 3 heads"),
        (lambda: tiny(conditioning="txt"), "did you mean 'text'"),
        (lambda: tiny(norm="batch"), "norm is one of layer, rms"),
        (lambda: tiny().check_order(make_order("random", (1, 1, 7), steps=7)), "not 'random-7'"),
        (lambda: tiny().start([tiny().vocabulary.labels([1])], Canvas.blank((1, 1, 8), 1)), "up to 7 tokens"),
        (lambda: tiny().start([prompts()], Canvas.blank((1, 1, 7), 2)), "one class id a row"),
        (lambda: tiny().vocabulary.labels([4]), "0 to 3, got 4"),
        (
            lambda: tiny(conditioning="text").start([tiny().vocabulary.labels([1])], Canvas.blank((1, 1, 7), 1)),
            "got none",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(VgenError, match=words):
        call()


def test_prompts_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(VgenError, match="the extra 'text'"):
        Prompts.from_pretrained("anything")


def test_other_feeds_are_refused():
    model = tiny()
    canvas = Canvas.blank(model.grid, 1)
    state = model.start([model.vocabulary.labels([1])], canvas)
    with pytest.raises(VgenError, match="use the order raster"):
        model.plan(state, SimpleNamespace(feed=None, size=1))
