"""The three outputs of the CLIP text tower that MaskGen and TA-TiTok read."""

from parity.registry import Fixture, assert_close, checker

from vgen.models.conditions.clip import ClipCaptions


@checker("maskgen.clip_text")
def check_clip_text(fixture: Fixture):
    out = fixture.outputs
    names = {"penultimate": "text", "pooled": "pooled", "guidance": "final"}
    activations = {key.split(".")[0] for key in out}
    for activation in activations:
        encoder = ClipCaptions.from_original(fixture.weights, fixture.config["heads"], activation)
        features = encoder.features(fixture.inputs["ids"])
        for recorded, ours in names.items():
            expected = out[f"{activation}.{recorded}"]
            assert_close(getattr(features, ours).view_as(expected), expected, what=f"{activation}: {recorded}")
    assert len(out) == len(names) * len(activations)
