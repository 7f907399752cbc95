"""MaskGIT over TiTok tokens, both networks: masks, logits, losses, and whole sampling traces."""

import re

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.models.masked.base import draw_mask, masked_token_loss
from vgen.models.masked.maskgit import MaskGITUViTModel, MaskGITViTModel
from vgen.samplers.choice import token_choice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import GridTape
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas

MODELS = {"ViT": MaskGITViTModel, "UViT": MaskGITUViTModel}


def _model(fixture: Fixture):
    config = fixture.config
    options = {
        "codes": config["codebook_size"],
        "classes": config["condition_num_classes"],
        "grid": (config["image_seq_len"],),
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "condition_dropout": config["class_label_dropout"],
    }
    if config["model_type"] == "ViT":
        options |= {"dropout": config["dropout"], "attention_dropout": config["attn_drop"]}
    return MODELS[config["model_type"]].from_original(fixture.weights, options)


@checker("maskgit.vit_logits", "maskgit.uvit_logits")
@torch.no_grad()
def check_logits(fixture: Fixture):
    model, inputs, out = _model(fixture), fixture.inputs, fixture.outputs
    tokens, labels = inputs["tokens"], inputs["labels"].tolist()
    permutation = inputs["perm_uniform"].argsort(dim=-1)
    masked = draw_mask(inputs["t_uniform"], permutation)
    assert_equal(masked, out["masks"], "mask")
    ids = tokens.masked_fill(masked, model.config.codes)
    assert_equal(ids, out["masked_tokens"], "masked tokens")
    condition = model.vocabulary.labels(labels)
    logits = model(condition, ids)
    assert_close(logits, out["logits_cond"], what="conditional")
    assert_close(model(model.null(condition), ids), out["logits_uncond"], what="null class")
    losses = [key for key in out if key.startswith("mlm_loss")]
    for key in losses:
        weight, smoothing = map(float, re.fullmatch(r"mlm_loss_w([\d.]+)_ls([\d.]+)", key).groups())
        terms = masked_token_loss(logits, tokens, masked, weight, smoothing)
        assert_close(terms["loss"], out[key], what=key)
        assert_close(terms["accuracy"], out["correct_tokens"], what="accuracy")
        model.register_to_config(unmasked_weight=weight, label_smoothing=smoothing)
        assert_close(model.loss(condition, tokens, inputs["t_uniform"], permutation)["loss"], out[key], what=key)
    assert len(out) == 5 + len(losses)


def _guidance(run: dict) -> tuple[ClassifierFree, float]:
    """Ours, and our scale minus the released one, which mixes as c + s (c - u) unless it is a cosine: then as u + s (c - u)."""
    scale, power = run["guidance_scale"], run["guidance_scale_pow"]
    return {
        "constant": (ClassifierFree(1 + scale), 1.0),
        "linear": (ClassifierFree(1 + scale, "step-linear-before"), 1.0),
        "power-cosine": (ClassifierFree(scale, "step-power-cosine", power), 0.0),
    }[run["guidance_decay"]]


@checker("maskgit.vit_generate", "maskgit.uvit_generate")
@torch.no_grad()
def check_generate(fixture: Fixture):
    model, inputs, out = _model(fixture), fixture.inputs, fixture.outputs
    labels = inputs["labels"].tolist()
    for name, run in fixture.config["runs"].items():
        steps, temperature = run["num_sample_steps"], run["randomize_temperature"]
        guidance, offset = _guidance(run)
        order = make_order("confidence", model.grid, steps=steps, schedule="maskgit", temperature=temperature)
        draws = [inputs[f"{name}.{kind}_{i}"] for i in range(steps) for kind in ("u_token", "u_conf")]
        canvas = Canvas.blank(model.grid, len(labels))
        condition = model.vocabulary.labels(labels)
        state = model.start([condition, model.null(condition)][: len(guidance.rows)], canvas)
        fed, forwards, conditional = [], [], []

        def spy(state, step, canvas, fed=fed, forwards=forwards, conditional=conditional, run=(guidance, offset)):
            fed.append(canvas.values.masked_fill(~canvas.known, model.config.codes))
            prediction = type(model).predict(model, state, step, canvas)
            # The release leaves the null class out where its scale is 0; here it is a row of the same call.
            forwards.append(1 + (run[0].weights(step)[0] != run[1]))
            conditional.append((step, prediction.logits[0]))
            return prediction

        model.predict = spy
        choice = token_choice("maskgit" if run["softmax_temperature_annealing"] else "maskgit-demo", temperature)
        for _ in decode(model, state, canvas, order, guidance, choice, GridTape.from_uniform(draws)):
            pass
        del model.predict
        fed = torch.stack(fed)
        assert_equal(fed, out[f"{name}.ids_in"], f"{name}: fed tokens")
        assert_equal((fed == model.config.codes).sum(dim=-1), out[f"{name}.n_masked"], f"{name}: masked tokens")
        assert_equal(canvas.values, out[f"{name}.ids"], f"{name}: tokens")
        assert sum(forwards) == out[f"{name}.forwards"].item()
        last, logits = conditional[-1]
        rows = torch.arange(len(labels))[:, None]
        assert_close(logits, out[f"{name}.cond_logits_last"][rows, last.targets], what=f"{name}: last logits")
        whole = model(condition, fed[-1])
        assert_close(whole, out[f"{name}.cond_logits_last"], what=f"{name}: last logits of all positions")
        assert state.counters.calls == steps
    assert len(out) == 5 * len(fixture.config["runs"])
