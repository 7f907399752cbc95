"""Ming-UniVision: cached decoding against one pass, guidance rows, dialogues, modality gates, training, files, bad input."""

import json
import sys

import pytest
import torch
from conftest import assert_same_weights
from models.ming.ming_tiny import TINY, published_state, tiny, word_tokenizer
from safetensors.torch import save_file

from vgen.errors import VgenError
from vgen.models.ming.dialogue import Context, Picture, Settings, Word, answer
from vgen.models.ming.guidance import COND, after_round, picture_rows, positions_of, prompt_masks
from vgen.models.ming.mingunivision import MingUniVisionModel
from vgen.models.ming.prompts import MingPrompts, Reply, loaded_size
from vgen.samplers.choice import FlowChoice, TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree, TextImageGuidance
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas

CHOICE = FlowChoice(substeps=3)
SETTINGS = Settings(choice=CHOICE)


@pytest.fixture(scope="module")
def model():
    return tiny()


def make(model, captions, scale=3.5, samples=None):
    """Pictures whose guidance rows read the prompts by themselves: latents, and the hidden states they were drawn from."""
    condition = model.vocabulary.captions(captions)
    guidance = ClassifierFree(scale)
    conditions = [condition, model.null(condition)][: len(guidance.rows)]
    samples = torch.arange(len(captions)) if samples is None else samples
    canvas = Canvas.blank(model.grid, samples, channels=model.config.channels)
    state, hidden = model.start(conditions, canvas), []
    noise = PhiloxNoise(0, canvas.samples)
    hidden.append(state.hidden)
    for _ in decode(model, state, canvas, model.default_order(), guidance, CHOICE, noise):
        hidden.append(state.hidden)
    return canvas, torch.stack(hidden[:4], dim=1), state


# ---------------------------------------------------------------- decoding


def test_cached_decoding_is_the_teacher_forced_forward(model):
    canvas, hidden, state = make(model, ["a red cat", "dog"], scale=1.0)
    condition = model.vocabulary.captions(["a red cat", "dog"])
    with torch.no_grad():
        forced = model.hidden_states(condition, canvas.values)
    torch.testing.assert_close(hidden, forced, atol=1e-5, rtol=1e-4)
    # Nothing follows the last token, so the language model is not run on it: the prompt and three tokens.
    assert state.counters.calls == 4 and state.counters.fed_tokens == 2 * (condition.ids.shape[1] + 3)
    pixels = model.picture(state)
    torch.testing.assert_close(pixels, model.vision.decode(canvas.values), atol=1e-5, rtol=1e-4)


def test_padding_and_neighbours_change_nothing(model):
    both, _, _ = make(model, ["a red cat make it red", "dog"])
    for row, caption in enumerate(("a red cat make it red", "dog")):
        alone, _, _ = make(model, [caption], samples=torch.tensor([row]))
        torch.testing.assert_close(alone.values[0], both.values[row], atol=1e-4, rtol=1e-4)


def test_pictures_of_a_dialogue_depend_on_their_sample_only(model):
    context = Context(model)
    context.read(model.vocabulary.prompt("a red cat"))
    every, state = context.draw_picture(SETTINGS, torch.arange(3))
    assert state.rows == 2 and state.counters.call_rows == 5 * 6
    alone, _ = context.draw_picture(SETTINGS, torch.tensor([2]))
    torch.testing.assert_close(every.latents[2:], alone.latents, atol=1e-4, rtol=1e-4)
    assert (every.latents[0] - every.latents[1]).abs().max() > 0.1
    assert context.length == context.cache.get_seq_length(), "the context itself does not move"


def test_without_guidance_there_is_one_row(model):
    context = Context(model)
    context.read(model.vocabulary.prompt("a red cat"))
    settings = Settings(TextImageGuidance(1.0, 1.0), CHOICE)
    _, state = context.draw_picture(settings, torch.tensor([0]))
    assert state.rows == 1


# ---------------------------------------------------------------- masks


def test_the_worked_example_of_two_rounds():
    """specs/mingunivision.md, section 8: 10 ids, of which 3-6 are the user's; one word, <image>, 4 visual tokens, </image>."""
    human, assistant = (1, 2, 3), (1, 4, 3)
    masks = prompt_masks([*human, 9, 9, 9, 9, *assistant], human, assistant, {41})
    rows = picture_rows(masks, 12)
    assert rows.long().tolist() == [[1] * 12, [1] * 3 + [0] * 4 + [1] * 5]
    assert positions_of(rows)[:, -1].tolist() == [11, 7]
    past = after_round(masks, 17)
    assert past.long().tolist() == [[1] * 17, [1] * 10 + [0] * 7, [1] * 17]
    masks = torch.cat((past, prompt_masks([*human, 9, 9, *assistant], human, assistant, {41})), dim=1)
    rows = picture_rows(masks, 26)
    null = [1] * 10 + [0] * 7 + [1] * 3 + [0] * 2 + [1] * 4
    assert rows.long().tolist() == [[1] * 26, null, [1] * 20 + [0] * 2 + [1] * 4]
    assert positions_of(rows)[:, -1].tolist() == [25, 16, 23]


def test_an_input_picture_makes_a_third_row(model):
    shown, context = torch.rand(3, 16, 16) * 2 - 1, Context(model)
    context.read(model.vocabulary.prompt(shown, "make it red"))
    picture, state = context.draw_picture(SETTINGS, torch.tensor([0]))
    assert state.rows == 3
    other = Context(model)
    other.read(model.vocabulary.prompt(shown, "what is that"))
    assert (other.draw_picture(SETTINGS, torch.tensor([0]))[0].latents - picture.latents).abs().max() > 1e-3


# ---------------------------------------------------------------- dialogues


def test_words_before_and_behind_a_picture(model):
    context, start, end = Context(model), model.config.image_start, model.config.end
    prompt = model.vocabulary.prompt("a red cat")
    events = list(answer(context, prompt, SETTINGS, forced=(5, start, model.config.image_end, end)))
    assert [type(event) for event in events] == [Word, Word, Picture, Word, Word]
    # Everything but the end word was fed: prompt, a word, <image>, 4 visual tokens, </image>.
    assert context.length == context.cache.get_seq_length() == context.masks.shape[1] == prompt.ids.shape[1] + 7
    assert context.masks[COND].all()
    # The answer is hidden from null in the next round.
    assert not context.masks[1, -7:].any()


def test_the_last_word_is_not_fed(model):
    context, start = Context(model), model.config.image_start
    prompt = model.vocabulary.prompt("a red cat")
    events = list(answer(context, prompt, SETTINGS, limit=2, forced=(5, start)))
    assert len(events) == 2 and context.length == prompt.ids.shape[1] + 1 and context.pictures == 0


def test_an_answer_can_be_left_in_the_middle(model):
    context = Context(model)
    events = answer(context, model.vocabulary.prompt("a cat"), SETTINGS, forced=(5, 6, 7, 8))
    next(events), next(events)
    events.close()
    assert context.length == context.masks.shape[1]
    list(answer(context, model.vocabulary.prompt("dog"), SETTINGS, limit=3))
    assert context.length == context.masks.shape[1] == context.cache.get_seq_length()


def test_pictures_count_in_later_rounds(model):
    """The release embeds the placeholders instead (a known deviation)."""

    def second_round(shade):
        context = Context(model)
        list(answer(context, model.vocabulary.prompt("a cat"), SETTINGS, limit=2))
        context.read(model.vocabulary.prompt(torch.full((3, 16, 16), shade), "make it red"))
        return context.hidden

    assert (second_round(0.9) - second_round(-0.9)).abs().max() > 1e-3


def test_a_dialogue_in_two_rounds_is_one_sequence(model):
    """With what is said forced, the cache after two rounds is that of one pass over all embeddings."""
    context, embeds = Context(model), []
    hook = model.llm.register_forward_hook(lambda module, args, result: embeds.append(args[0][:1]))
    end = model.config.end
    list(answer(context, model.vocabulary.prompt("a cat"), SETTINGS, forced=(model.config.image_start, 5, end)))
    list(answer(context, model.vocabulary.prompt("red"), SETTINGS, forced=(6, end)))
    hook.remove()
    sequence = torch.cat(embeds, dim=1)
    mask = torch.ones(sequence.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        whole = model.llm(sequence, mask, positions_of(mask))
    torch.testing.assert_close(context.hidden, whole[:, -1], atol=1e-5, rtol=1e-4)


def test_drawn_words_are_reproducible(model):
    def words(seed):
        settings = Settings(words=TokenChoice(1.0), noise=lambda samples: PhiloxNoise(seed, samples))
        events = answer(Context(model), model.vocabulary.prompt("a cat"), settings, limit=12)
        return [event.id for event in events if isinstance(event, Word)]

    assert words(1) == words(1) != words(2)


# ---------------------------------------------------------------- the language model


def test_gates_of_pictures_are_used_for_pictures_only(model):
    embeds, mask = torch.randn(1, 6, 32), torch.ones(1, 6, dtype=torch.bool)
    positions, picture = positions_of(mask), torch.tensor([[0, 0, 1, 1, 0, 0]])
    with torch.no_grad():
        text, mixed = (model.llm(embeds, mask, positions, None, kind) for kind in (None, picture))
        again = model.llm(embeds, mask, positions)
    assert torch.equal(text, again), "the modalities of one call are not left behind"
    torch.testing.assert_close(text[:, :2], mixed[:, :2])
    assert (text - mixed)[:, 2:].abs().max() > 1e-4
    plain = tiny(modality_gates=False)
    assert plain.llm.model.layers[0].block_sparse_moe.router.weight.shape == (1, 4, 32)
    with torch.no_grad():
        assert torch.equal(plain.llm(embeds, mask, positions, None, picture), plain.llm(embeds, mask, positions))


def test_fresh_weights_of_the_language_model_are_small():
    torch.manual_seed(0)
    for name, weight in MingUniVisionModel(**TINY).llm.named_parameters():
        if "norm" not in name:
            assert 0.004 < weight.std() < 0.008, name


def test_rope_does_not_lose_precision_in_bf16(model):
    rotary, positions = model.llm.model.rotary_emb, torch.tensor([[20000, 20001]])
    expected = rotary(torch.ones(1), positions)[0]
    found = tiny().to(torch.bfloat16).llm.model.rotary_emb(torch.ones(1), positions)[0]
    assert torch.equal(found, expected)


# ---------------------------------------------------------------- training


def test_loss_is_that_of_the_head_on_teacher_forced_states(model):
    torch.manual_seed(1)
    tokens, times, noise = torch.randn(2, 4, 8), torch.rand(8), torch.randn(8, 8)
    condition = model.vocabulary.captions(["a cat", "dog"])
    loss = model.loss(condition, tokens, times, noise)["loss"]
    z = model.vis_head(model.hidden_states(condition, tokens)).flatten(0, 1)
    target, t = tokens.flatten(0, 1), times[:, None]
    prediction = model.diffloss.net((1 - t) * target + t * noise, 1000 * times, z)
    torch.testing.assert_close(loss, (prediction - (target - noise)).square().mean())
    loss.backward()
    assert all(p.grad is not None for p in model.linear_proj.parameters())
    model.zero_grad()


def test_head_trains():
    torch.manual_seed(0)
    model = MingUniVisionModel(**TINY)
    head, z, target = model.diffloss, torch.randn(64, 48), torch.randn(64, 8)
    optimizer = torch.optim.AdamW(head.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        losses.append(head.loss(z, target)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# ---------------------------------------------------------------- files


def test_a_published_folder_loads(model, tmp_path):
    state = published_state(model) | {
        "audio.encoder.weight": torch.zeros(2),
        "linear_proj_audio.weight": torch.zeros(2),
    }
    names = sorted(state)
    for index in range(2):
        shard = {name: state[name] for name in names[index::2]}
        save_file(shard, tmp_path / f"model-{index + 1:05d}-of-00002.safetensors")
    index = {"weight_map": {name: f"model-{k % 2 + 1:05d}-of-00002.safetensors" for k, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = MingUniVisionModel.from_original(tmp_path, TINY)
    with pytest.raises(VgenError, match="no text tokenizer yet"):
        loaded.vocabulary.prompt("a cat")
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    loaded = MingUniVisionModel.from_single_file(tmp_path, TINY)
    assert_same_weights(loaded, model)
    torch.testing.assert_close(
        make(loaded, ["a cat"])[0].values, make(model, ["a cat"])[0].values, rtol=1e-4, atol=1e-4
    )


def test_files_that_do_not_fit(model):
    state = published_state(model)
    with pytest.raises(VgenError, match="does not fit MingUniVisionModel"):
        MingUniVisionModel.from_original(state, {**TINY, "layers": 3})
    with pytest.raises(VgenError, match="expected 16 \\+ 2 x 8"):
        MingUniVisionModel.from_original(state, {**TINY, "heads": 2, "key_heads": 1})
    lost = "model.model.layers.1.mlp.experts.2.up_proj.weight"
    with pytest.raises(VgenError, match=r"layers\.1\.mlp\.experts\.2\.up_proj\.weight"):
        MingUniVisionModel.from_original({key: value for key, value in state.items() if key != lost}, TINY)
    with pytest.raises(VgenError, match="1 unexpected"):
        MingUniVisionModel.from_original({**state, "model.model.layers.0.mlp.bias": torch.zeros(1)}, TINY)
    ungated = {key: value for key, value in state.items() if "image_gate" not in key and "audio_gate" not in key}
    assert MingUniVisionModel.from_original(ungated, {**TINY, "modality_gates": False})
    with pytest.raises(VgenError, match="of another shape"):
        MingUniVisionModel.from_original(ungated, TINY)


def test_half_precision_files_leave_the_pixel_decoder_exact(model):
    state = {key: value.to(torch.bfloat16) for key, value in published_state(model).items()}
    loaded = MingUniVisionModel.from_original(state, TINY)
    assert loaded.vision.pixel_decoder.head.weight.dtype == loaded.vision.sem_to_pix.weight.dtype == torch.float32
    assert loaded.llm.lm_head.weight.dtype == torch.bfloat16
    loaded.set_words(word_tokenizer())
    canvas, _, state = make(loaded, ["a cat"])
    assert loaded.picture(state).isfinite().all() and canvas.values.dtype == torch.float32
    context = Context(loaded)
    context.read(loaded.vocabulary.prompt(torch.zeros(3, 16, 16), "make it red"))
    assert context.draw_picture(SETTINGS, torch.tensor([0]))[0].latents.isfinite().all()


# ---------------------------------------------------------------- bad input


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vgen.models.ming.llm", None)
    with pytest.raises(VgenError, match="extra 'text'"):
        MingUniVisionModel(**TINY)


def test_constructors_refuse_what_does_not_fit():
    for change, words in (
        ({"channels": 4}, "latents of 4 channels, the tokenizer has 8"),
        ({"end": 40}, "below the vocabulary of 40"),
        ({"connector_layers": 0}, "at least 1 layer, got 0"),
        ({"key_heads": 3}, "multiple of the 3 key heads"),
        ({"experts_per_token": 5}, "from 1 to 4, got 5"),
    ):
        with pytest.raises(VgenError, match=words):
            MingUniVisionModel(**{**TINY, **change})
    with pytest.raises(VgenError, match="did you mean '16b-a3b'"):
        MingUniVisionModel.of_size("16b-a3")


def test_rows_and_latents_that_do_not_fit(model):
    two, one = model.vocabulary.captions(["a cat", "dog"]), model.vocabulary.captions(["a cat"])
    with pytest.raises(VgenError, match="each of the 2 samples, found 1 and 2"):
        model.start([two, model.null(one)], Canvas.blank(model.grid, 2, channels=8))
    with pytest.raises(VgenError, match="the canvas holds \\[4, 16\\]"):
        model.start([one], Canvas.blank(model.grid, 1, channels=16))
    with pytest.raises(VgenError, match="the canvas holds \\[9, 8\\]"):
        model.start([one], Canvas.blank((1, 3, 3), 1, channels=8))
    known = Canvas.blank(model.grid, 1, channels=8)
    known.known[:, 0] = True
    with pytest.raises(VgenError, match="takes no known tokens"):
        model.start([one], known)
    with pytest.raises(VgenError, match="in raster order"):
        model.check_order(make_order("random", model.grid, seed=0))
    with pytest.raises(VgenError, match="a finite number of at least 1"):
        TextImageGuidance(0.5)


def test_prompts_that_do_not_fit(model):
    prompts = model.vocabulary
    for empty in ((), (torch.zeros(3, 16, 16),), ("  ",), (Reply("a cat"),)):
        with pytest.raises(VgenError, match="a prompt needs text"):
            prompts.prompt(*empty)
    with pytest.raises(VgenError, match="a prompt needs text"):
        prompts.captions(["a cat", ""])
    with pytest.raises(VgenError, match="the limit is 5; shorten it"):
        prompts.captions(["a cat"], limit=5)
    with pytest.raises(VgenError, match="places for 1 tokens of pictures, the 0 pictures have 0"):
        Context(model).read(prompts.prompt("a <imagePatch> cat"))
    with pytest.raises(VgenError, match="must be a multiple of 8"):
        Context(model).read(prompts.prompt(torch.zeros(3, 20, 16), "what is that"))
    with pytest.raises(VgenError, match="knows 10 positions"):
        Context(tiny(positions=10)).read(prompts.prompt("a red cat make it red"))
    with pytest.raises(VgenError, match="a limit of 0"):
        list(answer(Context(model), prompts.prompt("a cat"), SETTINGS, limit=0))
    with pytest.raises(VgenError, match="at most 200 times as long"):
        loaded_size(10, 2001)


def test_a_tokenizer_of_another_model_is_refused(model, tmp_path):
    with pytest.raises(VgenError, match="id of <image> is 32, the model's is 35"):
        tiny(words=False, image_start=35).set_words(word_tokenizer())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(VgenError, match="is not a tokenizer file"):
        model.set_words(tmp_path / "tokenizer.json")


def test_prompt_layout(model):
    prompts: MingPrompts = model.vocabulary
    prompt = prompts.prompt("a", Reply("cat"), torch.zeros(3, 16, 24), "red")
    words = [prompts.tokenizer.id_to_token(number) for number in prompt.ids[0].tolist()]
    role = lambda name: ["<role>", name, "</role>"]  # noqa: E731
    picture = ["<image>", *["<imagePatch>"] * 6, "</image>"]
    turn = [*role("HUMAN"), "a", *role("ASSISTANT"), "cat", "<|endoftext|>"]
    assert words == [*turn, *role("HUMAN"), *picture, "red", *role("ASSISTANT")]
    hidden = [word for word, seen in zip(words, prompt.masks[2].tolist()) if not seen]
    assert hidden == ["red"], "the image row sees earlier turns and the picture"
    assert prompts.text([32, 33, *prompts.tokenizer.encode("red cat").ids, 30]) == "red cat"
