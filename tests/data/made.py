"""Small pictures and folders that tests make."""

import io
import json

from PIL import Image


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(color=(255, 0, 0), size=(8, 8)):
    return encode(Image.new("RGB", size, color))


PNG = png()


def put(root, files):
    """Files by their path below `root`: bytes, text, or what becomes JSON."""
    for name, contents in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(contents, (bytes, str)):
            contents = json.dumps(contents)
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return root


def sample(key, **members):
    """A sample of `write_shard` with a picture; members are text, bytes or JSON."""
    written = {
        name: value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
        for name, value in members.items()
    }
    return str(key), written if any(name in written for name in ("png", "jpg")) else {"png": PNG, **written}
