"""MaskGen-VQ and MaskGen-KL: training forwards, and whole sampling traces."""

import torch
from einops import rearrange
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.layers.sinusoid import interleaved, sin_cos
from vgen.models.masked.base import MASK_SCHEDULES, draw_mask, mask_share
from vgen.models.masked.maskgen import SCALE, MaskGenVQModel
from vgen.models.masked.maskgen_kl import MaskGenKLModel
from vgen.samplers.choice import DiffusionChoice, token_choice
from vgen.samplers.decode import decode
from vgen.samplers.diffusion_loss import diffusion_terms
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import DIFFUSION, GridTape
from vgen.samplers.orders import make_order
from vgen.samplers.orders.permuted import PermutedOrder
from vgen.samplers.predictions import Diffusion
from vgen.samplers.schedules import mar_sizes
from vgen.samplers.types import Canvas, Condition, Step
from vgen.tokenizers_vis.latents.posterior import DiagonalGaussian


def _options(tokenizer: dict, config: dict) -> dict:
    """Constructor arguments that both variants have."""
    return {
        "grid": (tokenizer["num_latent_tokens"],),
        "text_width": tokenizer["text_embed_dim"],
        "width": config["decoder_embed_dim"],
        "layers": config["decoder_depth"],
        "heads": config["decoder_num_heads"],
        "micro_width": config["micro_condition_embed_dim"] if config["micro_condition"] else 0,
        "condition_dropout": config["text_drop_prob"],
    }


def _condition(text: torch.Tensor, pooled: torch.Tensor, aesthetic: torch.Tensor | None) -> Condition:
    ids = torch.empty(len(text), 0, dtype=torch.long)
    extras = {"text": text, "pooled": pooled.flatten(1)}
    if aesthetic is not None:
        extras["aesthetic"] = aesthetic
    return Condition(ids, torch.ones(text.shape[:2], dtype=torch.bool), extras)


def _conditions(fixture: Fixture) -> list[Condition]:
    """The prompts, and as many empty ones with the same scores."""
    inputs = fixture.inputs
    batch = len(inputs["text"])
    null = (inputs[f"null_{name}"].expand(batch, -1, -1) for name in ("text", "pooled"))
    return [
        _condition(inputs["text"], inputs["pooled"], inputs.get("aes")),
        _condition(*null, inputs.get("aes")),
    ]


# ---------------------------------------------------------------------------------------------------------------- VQ


def _vq(fixture: Fixture) -> MaskGenVQModel:
    tokenizer, config = fixture.config["vq_model"], fixture.config["maskgen"]
    weights = fixture.weights
    return MaskGenVQModel.from_original(
        weights,
        {
            **_options(tokenizer, config),
            "codes": tokenizer["codebook_size"],
            # the release uses this one, whatever score it is given
            "aesthetic": config.get("sample_aesthetic_score", 6.0),
            "spare_rows": config.get("condition_num_classes", 1000) + 1,
            "head_rows": None if config.get("weight_tying", True) else len(weights["lm_head.weight"]),
            "mask_schedule": config.get("mask_schedule_strategy", "arccos"),
        },
    )


@checker("maskgen.vq_forward")
@torch.no_grad()
def check_vq_forward(fixture: Fixture):
    model, inputs, out = _vq(fixture), fixture.inputs, fixture.outputs
    condition, _ = _conditions(fixture)
    tokens, permutation = inputs["tokens"], inputs["perm_uniform"].argsort(dim=-1)
    masked = draw_mask(inputs["t_uniform"], permutation, model.config.mask_schedule)
    assert_equal(masked, out["masks"], "mask")
    ids = tokens.masked_fill(masked, model.config.codes)
    assert_equal(ids, out["masked_tokens"], "masked tokens")
    assert_close(model(condition, ids), out["logits"], what="logits")
    terms = model.loss(condition, tokens, inputs["t_uniform"], permutation)
    assert_close(terms["loss"], out["loss"], what="loss")
    assert_close(terms["accuracy"], out["correct_tokens"], what="accuracy")
    checked = {"masks", "masked_tokens", "logits", "loss", "correct_tokens"}
    if "micro_embed" in out:
        width = out["micro_embed"].shape[-1]
        assert_close(sin_cos(SCALE * inputs["aes"], width, 1000.0), out["micro_embed"], what="features of the score")
        checked.add("micro_embed")
    if "schedules" in out:
        names = ("root", "square", "cosine", "arccos", "linear")  # the order of the recording
        shares = torch.linspace(0, 1, out["schedules"].shape[1])
        assert set(names) == set(MASK_SCHEDULES)
        assert_close(torch.stack([mask_share(shares, name) for name in names]), out["schedules"], what="schedules")
        checked.add("schedules")
    assert checked == set(out)


@checker("maskgen.vq_generate")
@torch.no_grad()
def check_vq_generate(fixture: Fixture):
    model, inputs, out = _vq(fixture), fixture.inputs, fixture.outputs
    names = {
        "cosine": "step-cosine",
        "linear": "step-linear",
        "none": "constant",
        "flippedcosine": "step-flipped-cosine",
    }
    for name, run in fixture.config["runs"].items():
        steps, noise = run["num_sample_steps"], run["randomize_temperature"]
        guidance = MaskGenVQModel.guidance(
            run["guidance_scale"], names[run["guidance_decay"]], run.get("guidance_decay_scale_pow", 1.0)
        )
        sorting = run.get("prob_sorting", True)  # off: the confidence has no noise, and none is drawn
        order = make_order(
            "confidence", model.grid, steps=steps, schedule="maskgit", temperature=noise if sorting else 0.0
        )
        kinds = ("u_token", "u_conf") if sorting else ("u_token",)
        tape = GridTape.from_uniform([inputs[f"{name}.{kind}_{i}"] for i in range(steps) for kind in kinds])
        conditions = _conditions(fixture)[: len(guidance.rows)]
        canvas = Canvas.blank(model.grid, len(inputs["text"]))
        state = model.start(conditions, canvas)
        fed = []

        def spy(state, step, canvas, fed=fed):
            fed.append(canvas.values.masked_fill(~canvas.known, model.config.codes))
            return type(model).predict(model, state, step, canvas)

        model.predict = spy
        for _ in decode(model, state, canvas, order, guidance, token_choice("maskgit", noise), tape):
            pass
        del model.predict
        assert_equal(torch.stack(fed), out[f"{name}.ids_in"], f"{name}: fed tokens")
        assert_equal(canvas.values, out[f"{name}.ids"], f"{name}: tokens")
        logits = torch.cat([model(condition, fed[-1]) for condition in conditions])
        assert_close(logits, out[f"{name}.logits_last"][: len(logits)], what=f"{name}: last logits")
        assert state.counters.calls == steps
    assert len(out) == 3 * len(fixture.config["runs"])


# ---------------------------------------------------------------------------------------------------------------- KL


def _kl(fixture: Fixture) -> MaskGenKLModel:
    tokenizer, config = (fixture.config["model"][name] for name in ("vq_model", "maskgen"))
    losses = fixture.config["losses"]
    return MaskGenKLModel.from_original(
        fixture.weights,
        {
            **_options(tokenizer, config),
            "channels": tokenizer["token_size"],
            "head_width": losses["diffloss_w"],
            "head_layers": losses["diffloss_d"],
            "diffusion_batch": config["diffusion_batch_mul"],
        },
    )


@checker("maskgen.kl_forward")
@torch.no_grad()
def check_kl_forward(fixture: Fixture):
    model, inputs, out = _kl(fixture), fixture.inputs, fixture.outputs
    condition, _ = _conditions(fixture)
    batch, length = inputs["orders"].shape
    moments = inputs["moments"].view(batch, -1, 1, length)
    latent = DiagonalGaussian.from_moments(moments).sample(inputs["posterior_noise"])
    tokens = rearrange(latent * fixture.config["model"]["vq_model"]["scale_factor"], "b c 1 l -> b l c")
    masked = model.draw_mask(inputs["t_uniform"], inputs["orders"])
    assert_equal(masked, out["mask"], "mask")
    assert_close(model(condition, tokens, masked), out["z"], what="features")
    draws = (inputs[name] for name in ("t_uniform", "orders", "diffusion_t", "diffusion_noise"))
    assert_close(model.loss(condition, tokens, *draws)["loss"], out["loss"], 1e-3, "loss")
    checked = {"mask", "z", "loss", "head_out", "head_cfg", "head_mse", "head_vb"}
    if "micro_embed" in out:
        width = out["micro_embed"].shape[-1]
        assert_close(interleaved(SCALE * inputs["aes"], width), out["micro_embed"], what="features of the score")
        checked.add("micro_embed")
    _check_head(model, fixture)
    assert checked == set(out)


def _check_head(model: MaskGenKLModel, fixture: Fixture) -> None:
    inputs, out, channels = fixture.inputs, fixture.outputs, model.config.channels
    head = model.diffloss.net
    x, t, c = (inputs[f"head_{name}"] for name in ("x", "t", "c"))
    assert_close(head(x, t, c), out["head_out"], what="head")
    half = len(x) // 2
    scale = float(fixture.notes.split("guided version with scale ")[1].split()[0])
    guidance, one = ClassifierFree(scale), Step(0, torch.arange(half), half, (half, 0), 1, half)
    prediction = Diffusion(c.view(2, 1, half, -1), lambda x, _, z: head(x, t, z), model.diffloss.process, channels)
    noise, spread = prediction.denoise(x[:half], t[:half], guidance, guidance.weights(one))
    free = head(x[:half], t[half:], c[half:])[:, channels:]
    guided = torch.cat((torch.cat((noise, spread), dim=1), torch.cat((noise, free), dim=1)))
    assert_close(guided, out["head_cfg"], 1e-3, "guided head")
    noise = x.flip(0)  # of the recorded terms
    mse, bits = diffusion_terms(
        model.diffloss.process, head(model.diffloss.process.noised(x, t, noise), t, c), x, noise, t
    )
    assert_close(mse, out["head_mse"], what="squared error")
    assert_close(bits[t > 0], out["head_vb"][t > 0], what="bound")
    assert_close(bits, out["head_vb"], 1e-3, "bound with t = 0")  # fp32: a difference of nearly equal numbers


class RecordedOrder(PermutedOrder):
    """Recorded permutations, read from their end; positions of a call ascend, as in the recording."""

    def __init__(self, grid, rows: torch.Tensor, steps: int):
        super().__init__("recorded", grid, 0, lambda tokens: mar_sizes(tokens, steps))
        self.rows = iter(rows.flip(1))

    def permutation(self, generator, sizes, known):
        return torch.cat([part.sort().values for part in next(self.rows).split(list(sizes))])


class RecordedNoise:
    """The draws of a run in call order: for every step the initial noise, then one tensor per substep, largest t first."""

    def __init__(self, draws: list[torch.Tensor], substeps: int):
        self.draws, self.substeps = draws, substeps

    def normal(self, stream, step, shape, dtype=torch.float32):
        k = stream - DIFFUSION - 1
        place = 0 if k < 0 else self.substeps - k
        draw = self.draws[step.index * (self.substeps + 1) + place]
        return draw[: shape[0] * shape[1]].view(shape)  # the null rows' noise has no effect


@checker("maskgen.kl_generate", "maskgen.kl_t999_generate")
@torch.no_grad()
def check_kl_generate(fixture: Fixture):
    model, inputs, out = _kl(fixture), fixture.inputs, fixture.outputs
    spacing, scale_factor = (
        fixture.config["losses"]["num_sampling_steps"],
        fixture.config["model"]["vq_model"]["scale_factor"],
    )
    substeps = len(model.diffloss.process.respaced(spacing))
    checked = set()

    def same(actual, key, tol=1e-4):
        assert_close(actual, out[key], tol, key)
        checked.add(key)

    for name, run in fixture.config["runs"].items():
        steps = run["num_iter"]
        schedule = {"linear": "linear-clamped", "constant": "constant"}[run["cfg_schedule"]]
        guidance = ClassifierFree(run["cfg"], schedule)
        order = RecordedOrder(model.grid, inputs[f"{name}.orders"], steps)
        noise = RecordedNoise([inputs[f"{name}.noise_{i}"] for i in range(steps * (substeps + 1))], substeps)
        canvas = Canvas.blank(model.grid, len(inputs["text"]), channels=model.config.channels)
        state = model.start(_conditions(fixture)[: len(guidance.rows)], canvas)
        rows, scales, sizes = len(guidance.rows), [], []

        def spy(state, step, canvas, name=name, rows=rows, scales=scales, sizes=sizes, guidance=guidance):
            tokens, masked = canvas.values.repeat(rows, 1, 1), ~canvas.known.repeat(rows, 1)
            same(tokens, f"{name}.tokens_{step.index}")
            same(masked.float(), f"{name}.mask_{step.index}")
            same(model.run(state.context, tokens, masked), f"{name}.z_{step.index}")
            scales.append(guidance.weights(step)[0])
            sizes.append(rows * canvas.batch * step.size)
            return type(model).predict(model, state, step, canvas)

        model.predict = spy
        choice = DiffusionChoice(run["temperature"], spacing)
        for _ in decode(model, state, canvas, order, guidance, choice, noise):
            pass
        del model.predict
        same(torch.tensor(scales), f"{name}.cfg_per_step")
        assert_equal(torch.tensor(sizes), out[f"{name}.rows_per_step"], f"{name}: rows of the head")
        same(rearrange(canvas.values, "b l c -> b c 1 l") / scale_factor, f"{name}.latent")
        assert state.counters.calls == steps
    assert checked | {key for key in out if key.endswith(".rows_per_step")} == set(out)
