"""Lumina: orders, padding, cached decoding against one forward pass, words, files."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from vgen.errors import VgenError
from vgen.layers.cache import KVCache, Memory
from vgen.models.lumina.lumina import END_OF_LINE, LuminaModel
from vgen.models.lumina.prompts import LuminaPrompts
from vgen.pipelines.visual import VisualPipeline
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas, Condition
from vgen.tokenizers_vis.chameleon import ChameleonVQGAN, image_token_ids

TINY = {"words": 8815, "codes": 24, "grid": (4, 6), "width": 32, "layers": 2, "heads": 4, "hidden": 48}


def tiny(**changes):
    torch.manual_seed(0)
    model = LuminaModel(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def prompts(*rows):
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[1] * (length - len(row))] for row in rows])
    return Condition(ids, torch.arange(length) < torch.tensor([[len(row)] for row in rows]))


def run(model, condition, order, scale=2.0, seed=0):
    guidance = ClassifierFree(scale)
    conditions = [condition, model.null(condition)][: len(guidance.rows)]
    canvas = Canvas.blank(order.grid, len(condition.mask))
    state = model.start(conditions, canvas)
    logits = torch.zeros(len(conditions), *canvas.values.shape, model.config.codes)
    for step, _ in decode(
        Spy(model, logits), state, canvas, order, guidance, TokenChoice(), PhiloxNoise(seed, canvas.samples)
    ):
        assert step.size <= 4
    return canvas, logits, state


class Spy:
    def __init__(self, model, logits):
        self.model, self.logits, self.commit = model, logits, model.commit

    def predict(self, state, step, canvas):
        prediction = self.model.predict(state, step, canvas)
        self.logits[:, :, step.targets] = prediction.logits
        return prediction


@pytest.mark.parametrize("window", [1, 2, 5, 6])
def test_a_row_sees_what_was_decoded_when_it_was_asked(window):
    """Every logit again from one uncached pass over the tokens that had been fed by then."""
    model = tiny(key_heads=2)
    order, condition = make_order("zip", model.grid, window=window), prompts([0, 7, 9])
    canvas, logits, state = run(model, condition, order, scale=1.0)
    assert state.counters.calls == order.calls == 6 + 3 * min(window, 6)
    call, header = order.step_ids().tolist(), state.prefix[0].tolist()
    words, places, fed = list(header), list(range(1 - len(header), 1)), [0] * len(header)
    for position, code in enumerate(canvas.values[0].tolist()):
        row, column = divmod(position, 6)
        if column == 0 and row > 0:
            words.append(END_OF_LINE)
            places.append(row * 7)
            fed.append(call[position])
        words.append(int(model.image_ids[code]))
        places.append(1 + column + row * 7)
        fed.append(call[position] + 1)
    words, places, fed = torch.tensor(words), torch.tensor(places), torch.tensor(fed)
    # A token sees what stands before it and had been fed when it was.
    visible = (places <= places[:, None]) & (fed <= fed[:, None])
    expected = uncached(model, words, places + len(header) - 1, visible)
    wanted = torch.tensor([position + position // 6 for position in range(24)])  # places of the tokens before
    torch.testing.assert_close(logits[0, 0], expected[wanted + len(header) - 1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def uncached(model, words, positions, visible):
    """Logits [n, codes] of all words in one pass."""
    config, count = model.config, len(words)
    cache = KVCache(config.layers, 1, config.key_heads or config.heads, count, config.width // config.heads)
    x, rope = model.model["embed_tokens"](words[None]), model._rope(positions[None])
    for layer, block in enumerate(model.model["layers"]):
        x = block(x, rope, visible[None, None], Memory(cache, layer, torch.arange(count), count))
    return model.lm_head(model.model["norm"](x[0]))[:, model.image_ids]


def test_padding_and_neighbours_change_nothing():
    model, order = tiny(), make_order("zip-2", (1, 4, 6))
    long, short = [0, 5, 6, 7, 8], [0, 9]
    _, both, _ = run(model, prompts(long, short), make_order("raster", model.grid))
    for row, prompt in enumerate((long, short)):
        condition = prompts(prompt)
        canvas = Canvas.blank(order.grid, torch.tensor([row]))
        state = model.start([condition, model.null(condition)], canvas)
        logits = torch.zeros(2, 1, 24, 24)
        raster = make_order("raster", model.grid)
        for _ in decode(
            Spy(model, logits),
            state,
            canvas,
            raster,
            ClassifierFree(2.0),
            TokenChoice(),
            PhiloxNoise(0, canvas.samples),
        ):
            pass
        torch.testing.assert_close(logits[:, 0], both[:, row], atol=1e-4, rtol=1e-4)


def word_file(folder, codes=24):
    words = {"<s>": 0, "<pad>": 1, "<unk>": 2, "cat": 3}
    for code in range(codes):
        # Not in the order of the codes: what the file says must be what is used.
        words["IMGIMG" + "".join("ABCDEFGHIJ"[int(d)] for d in str(code)) + "Z"] = 4 + (code * 7) % codes
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "text_tokenizer.json"))
    return folder / "text_tokenizer.json"


def test_words_come_from_the_file_and_are_saved_with_the_model(tmp_path):
    ids = image_token_ids(word_file(tmp_path), 24)
    assert ids[0] == 4 and ids[1] == 11 and sorted(ids.tolist()) == list(range(4, 28))
    with pytest.raises(VgenError, match="no word for 1 of 25 image codes"):
        image_token_ids(tmp_path / "text_tokenizer.json", 25)
    model = tiny()
    model.read_words({"tokenizer": tmp_path})
    condition = model.vocabulary.captions(["cat", "cat cat cat"])
    assert condition.ids[0, 0] == 0 and condition.mask.sum(dim=1).diff().tolist() == [2]
    tokenizer = ChameleonVQGAN(
        ch=8, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, n_embed=24, embed_dim=4, num_groups=4
    )
    pipe = VisualPipeline(tokenizer.eval(), model, order="zip-2", guidance_scale=3.0, top_k=9)
    pipe.save_pretrained(tmp_path / "pipe")
    again = VisualPipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(again.model.image_ids, ids)
    assert torch.equal(again("cat", seed=3).tokens, pipe("cat", seed=3).tokens)


def test_a_published_folder_loads_with_its_own_numbers(tmp_path):
    model = tiny()
    state = {f"{key}": value.contiguous() for key, value in model.state_dict().items()}
    names = sorted(state)
    save_file({key: state[key] for key in names[:9]}, tmp_path / "model-00001-of-00002.safetensors")
    extra = {"model.vqmodel.quantize.embedding.weight": torch.zeros(2, 2)}
    save_file({key: state[key] for key in names[9:]} | extra, tmp_path / "model-00002-of-00002.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "vocab_size": 8815, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = LuminaModel.from_original(tmp_path, {**LuminaModel.size_config("7B"), "codes": 24, "grid": (4, 6)})
    order, condition = make_order("raster", model.grid), prompts([0, 7])
    assert torch.equal(run(loaded, condition, order)[0].values, run(model, condition, order)[0].values)
    (tmp_path / "config.json").write_text(json.dumps({**config, "swin_norm": True}))
    with pytest.raises(VgenError, match="swin_norm"):
        LuminaModel.from_original(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(VgenError, match=r"lacks model-00001-of-00002\.safetensors"):
        LuminaModel.from_original(tmp_path, TINY)


def test_bad_input_is_one_sentence():
    model = tiny()
    with pytest.raises(VgenError, match="left to right"):
        model.check_order(make_order("random", model.grid))
    with pytest.raises(VgenError, match="left to right"):
        model.check_order(make_order("blocks-2", model.grid))
    with pytest.raises(VgenError, match="even sides"):
        LuminaModel(**{**TINY, "grid": (4, 5)})
    with pytest.raises(VgenError, match="no size token"):
        LuminaModel(**{**TINY, "grid": (4, 60)})
    with pytest.raises(VgenError, match="unknown Lumina size"):
        LuminaModel.of_size("8B")
    with pytest.raises(VgenError, match="does not fit LuminaModel"):
        LuminaModel.from_original(model.state_dict(), {**TINY, "layers": 3})
    with pytest.raises(VgenError, match="the limit is 5; shorten it"):
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        LuminaPrompts(tokenizer, (1, 4, 6)).captions(["a cat"], limit=5)
