"""Ming-UniVision (specs/mingunivision.md): flow head, language model, masks, pictures in dialogues, and their preprocessing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from parity.checkers.mingtok import mingtok_options
from parity.registry import Fixture, assert_close, assert_equal, checker
from PIL import Image
from torch import Tensor

from vgen.checkpoints import load_exactly
from vgen.layers.sinusoid import angles, cos_sin
from vgen.models.mar.heads import TIME_SCALE
from vgen.models.ming.dialogue import Context, Picture, Settings, Word, answer
from vgen.models.ming.files import granite_names
from vgen.models.ming.flow_head import MingFlowHead
from vgen.models.ming.guidance import COND, IMAGE, NULL, prompt_masks
from vgen.models.ming.llm import MingLLM
from vgen.models.ming.mingunivision import MingUniVisionModel
from vgen.models.ming.prompts import Prompt, for_editing, for_understanding, load_picture, loaded_size
from vgen.samplers.choice import FlowChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree, TextImageGuidance
from vgen.samplers.noise import TapeNoise
from vgen.samplers.types import Canvas, Condition, Step

# ---- the flow head ------------------------------------------------------------------------------------------------------


def _one_token(index: int = 0) -> Step:
    return Step(index, torch.tensor([index]), keep=1, unknown=(1, 0), total=1, start_unknown=1)


@checker("mingunivision.flowhead")
@torch.no_grad()
def check_flow_head(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    size = (config["target_channels"], config["z_channels"], config["width"], config["depth"], config["mlp_mult"])
    head = MingFlowHead(*size)
    load_exactly(head, fixture.weights)
    t = inputs["t"]
    assert_close(angles(torch.ones(1), 2 * len(out["freqs"]))[0], out["freqs"], what="frequencies")
    assert_close(cos_sin(TIME_SCALE * t, out["t_sinusoid"].shape[1]), out["t_sinusoid"], what="sinusoids")
    assert_close(head.net.time_embed(TIME_SCALE * t), out["t_embed"], what="time embedding")
    assert_close(-head.velocity(inputs["x"], t, inputs["z"]), out["v"], what="network")
    for name, run in config["runs"].items():
        _check_run(head, fixture, name, run)
    given = [inputs[f"loss_{part}"] for part in ("z", "target")]
    times, noise = inputs["loss_t"], inputs["loss_noise"]
    assert_close(head.loss(*given, None, times, noise)["loss"], out["loss"], what="loss")
    assert_close(head.loss(*given, inputs["loss_mask"], times, noise)["loss"], out["loss_masked"], what="masked loss")
    times, noise = inputs["loss_lognorm_normal"].sigmoid(), inputs["loss_lognorm_noise"]
    assert_close(
        head.loss(*given, None, times, noise)["loss"], out["loss_lognorm"], what="loss with logit-normal times"
    )


def _check_run(head: MingFlowHead, fixture: Fixture, name: str, run: dict[str, Any]) -> None:
    """One sampling trace. Rows are guidance rows of one sample, or samples of their own where there is no guidance."""
    rows, out = run["rows"], fixture.outputs
    scales = {ours: run[theirs] for theirs, ours in (("text_cfg", "text"), ("image_cfg", "image")) if theirs in run}
    guidance = TextImageGuidance(**scales, image_row=rows == 3, renorm=run.get("cfg_renorm_type") == "channel")
    guided = rows > 1 and guidance.text != 1
    if not guided:
        guidance = TextImageGuidance(1.0, 1.0)
    assert len(guidance.rows) == (rows if guided else 1)
    z = fixture.inputs[f"{name}_z"]
    prediction = head.prediction(z[:, None, None] if guided else z[None, :, None])
    seen: list[tuple[Tensor, float, Tensor]] = []
    velocity = prediction.velocity

    def spy(x: Tensor, t: float) -> Tensor:
        seen.append((x, t, velocity(x, t)))
        return seen[-1][2]

    shift, steps = run.get("time_shifting_factor", 1.0), fixture.config["num_sampling_steps"]
    choice = FlowChoice(run.get("temperature", 1.0), int(steps), "euler", shift)
    noise = TapeNoise([], [], [fixture.inputs[f"{name}_noise"]])
    drawn = replace(prediction, velocity=spy).draw(_one_token(), guidance, choice, noise).values
    repeats = rows if guided else 1
    assert_close(drawn.flatten(0, 1).repeat(repeats, 1), out[f"{name}_sample"], what=f"{name} sample")
    x = torch.stack([x.flatten(0, 1).repeat(repeats, 1) for x, _, _ in seen])
    assert_close(x, out[f"{name}_x"], what=f"{name} states")
    times = torch.tensor([t for _, t, _ in seen])[:, None].expand(-1, rows)
    assert_close(times, out[f"{name}_t"], what=f"{name} times")
    v = torch.stack([v.flatten(0, 2) for _, _, v in seen])
    assert_close(-v, out[f"{name}_v"], what=f"{name} velocities")


# ---- the language model -----------------------------------------------------------------------------------------------


def llm_options(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of the arguments of MingUniVisionModel."""
    assert config["norm_topk_prob"] and not config["first_k_dense_replace"] and not config.get("rope_scaling")
    return {
        "words": config["vocab_size"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "key_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "experts": config["num_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "expert_hidden": config["moe_intermediate_size"],
        "shared_hidden": config["moe_intermediate_size"] * config["num_shared_experts"],
        "theta": config["rope_theta"],
        "eps": config["rms_norm_eps"],
        "positions": config["max_position_embeddings"],
    }


@checker("mingunivision.llm")
@torch.no_grad()
def check_language_model(fixture: Fixture) -> None:
    config, inputs, out = fixture.config["llm"], fixture.inputs, fixture.outputs
    gates = 3 if config["multi_gate"] else 1
    with torch.device("meta"):
        model = MingLLM(**llm_options(config), gates=gates, padding=config["pad_token_id"])
    size = config["head_dim"]
    query_rows, key_rows = (config[name] * size for name in ("num_attention_heads", "num_key_value_heads"))
    load_exactly(model, granite_names(dict(fixture.weights), query_rows, key_rows))
    model.eval()
    cosines, sines = model.model.rotary_emb(out["rope_cos"], torch.arange(len(out["rope_cos"]))[None])
    assert_close(cosines[0], out["rope_cos"], what="cosines")
    assert_close(sines[0], out["rope_sin"], what="sines")

    layers = model.model.layers
    seen: dict[str, Tensor] = {}
    hooks = []
    for number, layer in enumerate(layers):

        def keep(module, args, result=None, number=number):
            seen[f"layer{number}"] = args[0]

        def route(module, args, result, number=number):
            seen[f"logits{number}"], seen[f"topk{number}"] = result[0], result[2]

        hooks += [layer.register_forward_pre_hook(keep), layer.block_sparse_moe.router.register_forward_hook(route)]
    mask, modality = inputs["mask"].bool(), inputs.get("image_mask")
    visible, cache = mask, model.new_cache()
    modality = None if modality is None else modality.long()
    hidden = model(inputs["embeds"], mask, inputs["pos"], cache, modality)
    for hook in hooks:
        hook.remove()
    assert_close(hidden[visible], out["hidden"][visible], what="hidden states")
    assert_close(model.logits(hidden)[visible], out["logits"][visible], what="logits")
    for number in range(len(layers)):
        entering = seen[f"layer{number}"]
        assert_close(entering[visible], out[f"hidden_layer{number}"][visible], what=f"input of layer {number}")
        found, recorded = (table.unflatten(0, mask.shape)[visible] if table.dim() == 2 else table[visible]
                           for table in (seen[f"logits{number}"], out[f"router_logits{number}"]))  # fmt: skip
        assert_close(found, recorded, what=f"router {number}")
        chosen = seen[f"topk{number}"].unflatten(0, mask.shape)[visible]
        recorded = out[f"router_topk{number}"][visible]
        assert_equal(chosen.sort(dim=-1).values, recorded.sort(dim=-1).values, f"experts of layer {number}")
    assert_close(hidden[visible], out[f"hidden_layer{len(layers)}"][visible], what="output of the last layer")
    step = 0
    while f"step{step}_embeds" in inputs:
        mask = torch.cat((mask, torch.ones(len(mask), 1, dtype=torch.bool)), dim=1)
        hidden = model(inputs[f"step{step}_embeds"], mask, inputs[f"step{step}_pos"], cache)
        assert_close(hidden, out[f"step{step}_hidden"], what=f"step {step}")
        step += 1
    for number, layer in enumerate(cache.layers):
        for name, stored in (("k", layer.keys), ("v", layer.values)):
            recorded = out[f"cache_{name}{number}"]
            rows = mask[:, None, :, None].expand_as(stored)
            assert stored.shape == recorded.shape
            assert_close(stored[rows], recorded[rows], what=f"cache {name} {number}")
    every = torch.ones(inputs["embeds"].shape[:2], dtype=torch.bool)
    plain = model(inputs["embeds"], every, every.long().cumsum(dim=1) - 1)
    assert_close(plain, out["hidden_text_only"], what="text only")


# ---- pictures in dialogues ------------------------------------------------------------------------------------------


def ming_model(fixture: Fixture) -> MingUniVisionModel:
    """The model of a recording of whole calls."""
    config = fixture.config
    llm, head, tiny = config["llm"], config["vishead_diffloss"], config["tiny"]
    assert head["vis_head_arch"] == "linear2-norm"
    side = math.isqrt(llm["num_image_tokens_for_gen"])
    options = {
        **llm_options(llm),
        "modality_gates": llm["multi_gate"],
        "connector_layers": config["mlp_depth"],
        "head_width": head["diffloss_w"],
        "head_layers": head["diffloss_d"],
        "head_ratio": int(head["gen_method"].rpartition("-")[2]),
        "grid": (side, side),
        "channels": config["mingtok"]["low_level_encoder"]["out_dim"],
        "mingtok": mingtok_options(config["mingtok"]),
        "understanding_size": tiny["und_size"],
        "end": llm["eos_token_id"],
        "image_start": llm["image_start_token"],
        "image_patch": llm["image_patch_token"],
        "image_end": tiny["IMG_E"],
    }
    return MingUniVisionModel.from_original(fixture.weights, options)


def _settings(fixture: Fixture, prefix: str, keep_masks: bool = False) -> Settings:
    greedy = torch.zeros(
        1, 1, fixture.config["llm"]["vocab_size"]
    )  # asked for, but at temperature 0 it changes nothing
    tape = TapeNoise([greedy] * 512, [], _numbered(fixture.inputs, f"{prefix}noise_"))
    steps = int(fixture.config["vishead_diffloss"]["num_sampling_steps"])
    return Settings(choice=FlowChoice(substeps=steps), noise=lambda samples: tape, keep_masks=keep_masks)


def _numbered(tensors: dict[str, Tensor], prefix: str) -> list[Tensor]:
    count = sum(name.startswith(prefix) for name in tensors)
    return [tensors[f"{prefix}{index}"] for index in range(count)]


class Recorded(dict):
    """Recorded tensors that know which of them were looked at."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__(tensors)
        self.waiting = set(tensors)

    def __getitem__(self, name: str) -> Tensor:
        self.waiting.discard(name)
        return super().__getitem__(name)


class Calls:
    """The calls of a model's language model and vision head, in order."""

    def __init__(self, model: MingUniVisionModel):
        self.llm: list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]] = []
        self.z: list[Tensor] = []
        self.hooks = [
            model.llm.register_forward_hook(self._keep),
            model.vis_head.register_forward_hook(lambda module, args, result: self.z.append(result)),
        ]

    def _keep(self, module, args, result):
        embeds, mask, positions = args[:3]
        self.llm.append((embeds, mask, positions, args[4] if len(args) > 4 else None, result))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def _check_round(fixture: Fixture, context: Context, prefix: str, found_as: str = "", keep: bool = False) -> None:
    """One call, with everything that was recorded of it under `found_as` (default: the prefix of its inputs)."""
    config, inputs, tiny = fixture.config, fixture.inputs, fixture.config["tiny"]
    found_as = found_as or prefix
    all_out = fixture.outputs.items()
    out = Recorded({name.removeprefix(found_as): value for name, value in all_out if name.startswith(found_as)})
    model, ids = context.model, inputs[f"{prefix}input_ids"]
    kept = {tiny["IMG_S"], tiny["IMG_PATCH"], tiny["IMG_E"]}
    masks = prompt_masks(ids[0].tolist(), tiny["USER"], tiny["ASSIST"], kept)
    for row, name in ((COND, ""), (NULL, "uncond_"), (IMAGE, "text_uncond_")):
        if f"{prefix}{name}attention_mask" in inputs:
            assert_equal(masks[row : row + 1], inputs[f"{prefix}{name}attention_mask"], f"{prefix}{name}mask")
    pictures = tuple(inputs.get(f"{prefix}pixel_values", torch.empty(0, 3, 1, 1)))
    settings = _settings(fixture, prefix, keep)
    limit = config.get("max_new_tokens", {}).get(prefix, 512)
    words, logits, made, state = [], [], None, None
    picture_of = context.draw_picture

    def spy(*args):
        nonlocal state
        picture, state = picture_of(*args)
        return picture, state

    context.draw_picture = spy
    with Calls(model) as calls:
        for event in answer(context, Prompt(ids, masks, pictures), settings, limit, config["forced"][prefix]):
            if isinstance(event, Word):
                words.append(event.id)
                logits.append(model.llm.logits(context.hidden))
            else:
                made = event
    context.draw_picture = picture_of
    _check_calls(out, calls)
    if "sequence" in out:
        assert_equal(torch.cat((ids, torch.tensor([words])), dim=1), out["sequence"], f"{found_as}sequence")
        assert_close(torch.stack(logits, dim=1), out["logits"], 1e-3, f"{found_as}logits")
    for row, name in ((COND, "past_mask"), (NULL, "past_uncond"), (IMAGE, "past_text_uncond")):
        if name in out:
            assert_equal(context.masks[row : row + 1], out[name], found_as + name)
    for number, layer in enumerate(context.cache.layers):
        if f"cache_k{number}" in out:
            assert_close(layer.keys, out[f"cache_k{number}"], what=f"{found_as}keys {number}")
            assert_close(layer.values, out[f"cache_v{number}"], what=f"{found_as}values {number}")
    if made is not None:
        _check_picture(model, settings, out, made, state, calls)
    if "image_embeds" in out:
        features = torch.cat([model.vision.features(pixels[None]) for pixels in pictures])
        assert_close(features, out["features"], what=f"{found_as}features")
        assert_close(model.connect(features), out["image_embeds"], what=f"{found_as}connector")
    assert not out.waiting, f"{found_as}: nothing checks {sorted(out.waiting)}"


def _check_calls(out: dict[str, Tensor], calls: Calls) -> None:
    recorded = {int(name[2:].split("_")[0]) for name in out if name.startswith("lm")}
    if "sequence" in out:
        assert len(recorded) == len(calls.llm), (
            f"{len(calls.llm)} calls of the language model, recorded {len(recorded)}"
        )
    for index in recorded:
        embeds, mask, positions, modality, hidden = calls.llm[index]
        for name, value in (("embeds", embeds), ("hidden", hidden)):
            if f"lm{index}_{name}" in out:
                assert_close(value, out[f"lm{index}_{name}"], what=f"call {index} {name}")
        assert_equal(mask, out[f"lm{index}_mask"], f"call {index} mask")
        assert_equal(positions, out[f"lm{index}_pos"], f"call {index} positions")
        if f"lm{index}_image_mask" in out:
            assert_equal(modality, out[f"lm{index}_image_mask"], f"call {index} modality")


def _check_picture(model, settings, out, made: Picture, state, calls: Calls) -> None:
    """Latents [1, N, C], features, pixels; the release draws one latent more than it uses, from the last hidden state."""
    rows = state.rows
    latents, z = made.latents[0], torch.stack(calls.z)
    extra = model.vis_head(state.hidden)
    if "latents" in out:
        features, guidance = extra[:, None, None], replace(settings.guidance, image_row=rows == 3)
        noise = settings.noise(torch.zeros(1))
        last = model.diffloss.prediction(features).draw(_one_token(), guidance, settings.choice, noise).values[0]
        assert_close(_per_row(torch.cat((latents, last)), rows), out["latents"], what="latents")
    if "z" in out:
        assert_close(torch.cat((z, extra[None])), out["z"], what="vision head")
    if "features" in out:
        assert_close(_per_row(state.features[0], rows)[:, :, None], out["features"], what="features")
    if "image" in out:
        assert_close(made.pixels.expand(rows, -1, -1, -1), out["image"], what="picture")


def _per_row(values: Tensor, rows: int) -> Tensor:
    """[N, C] -> [N, R, C]."""
    return values[:, None].expand(-1, rows, -1)


@checker("mingunivision.t2i_und")
@torch.no_grad()
def check_calls_of_their_own(fixture: Fixture) -> None:
    model = ming_model(fixture)
    for prefix in fixture.config["forced"]:
        _check_round(fixture, Context(model), prefix)


@checker("mingunivision.edit")
@torch.no_grad()
def check_rounds(fixture: Fixture) -> None:
    model = ming_model(fixture)
    for mode, keep in (("", False), ("keep_", True)):
        context = Context(model)
        for prefix in sorted(fixture.config["forced"]):
            if any(name.startswith(mode + prefix) for name in fixture.outputs):
                _check_round(fixture, context, prefix, mode + prefix, keep)


@checker("mingunivision.t2i_v1")
@torch.no_grad()
def check_first_version(fixture: Fixture) -> None:
    model, inputs, out = ming_model(fixture), fixture.inputs, fixture.outputs
    masks = inputs["attention_mask"].bool()
    conditions = [Condition(inputs["input_ids"][None], mask[None]) for mask in masks]
    canvas, settings = Canvas.blank(model.grid, 1, channels=model.config.channels), _settings(fixture, "")
    guidance = ClassifierFree(fixture.config["image_gen_cfg"])
    with Calls(model) as calls:
        state = model.start(conditions, canvas)
        for _ in decode(model, state, canvas, model.default_order(), guidance, settings.choice, settings.noise(None)):
            pass
    recorded = sum(name.startswith("lm") and name.endswith("_hidden") for name in out)
    assert len(calls.llm) == recorded
    for index, (_, mask, positions, _, hidden) in enumerate(calls.llm):
        rows = mask[:, -hidden.shape[1] :]  # what masked queries see means nothing
        assert_close(hidden[rows], out[f"lm{index}_hidden"][rows], what=f"call {index}")
        assert_equal(mask, out[f"lm{index}_mask"], f"call {index} mask")
        assert_equal(positions, out[f"lm{index}_pos"], f"call {index} positions")
    assert_close(torch.stack(calls.z), out["z"], what="vision head")
    assert_close(_per_row(canvas.values[0], state.rows), out["latents"], what="latents")
    assert_close(_per_row(state.features[0], state.rows)[:, :, None], out["features"], what="features")
    assert_close(model.picture(state).expand(state.rows, -1, -1, -1), out["image"], what="picture")


# ---- masks and pixels ---------------------------------------------------------------------------------------------------


@checker("mingunivision.masks")
def check_masks(fixture: Fixture) -> None:
    config = fixture.config
    kept = {config["image_start"], config["image_patch"], config["image_end"]}
    for name, ids in fixture.inputs.items():
        case = name.removeprefix("ids_")
        prefixes = (config["user_prefix_ids"], config["assistant_prefix_ids"])
        masks = prompt_masks(ids[0].tolist(), *prefixes, kept)
        assert masks[COND].all()
        assert_equal(masks[NULL : NULL + 1], fixture.outputs[f"uncond_{case}"], f"null {case}")
        assert_equal(masks[IMAGE : IMAGE + 1], fixture.outputs[f"text_uncond_{case}"], f"image {case}")


@checker("mingunivision.preprocess")
def check_preprocess(fixture: Fixture) -> None:
    config, out = fixture.config, fixture.outputs
    sizes = [loaded_size(*size) for size in fixture.inputs["sizes_hw"].tolist()]
    assert_equal(torch.tensor(sizes), out["smart_resize_hw"], "sizes")
    picture = load_picture(Image.fromarray(fixture.inputs["rgb_u8"].numpy()))
    assert_equal(torch.from_numpy(np.array(picture)), out["fetched_u8"], "loaded picture")
    assert_close(for_understanding(picture, config["und_size"]), out["und"], what="for understanding")
    assert_close(for_editing(picture, config["edit_size"]), out["edit"], what="for editing")
