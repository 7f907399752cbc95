"""Models with a table of named sizes."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from vgen.errors import VgenError, nearest


class NamedSizes:
    """SIZES: keyword arguments of the constructor by the name of a size."""

    SIZES: ClassVar[dict[str, dict[str, Any]]]

    @classmethod
    def size_config(cls, size: str) -> dict[str, Any]:
        """Constructor arguments of a named size. Raises VgenError for an unknown one."""
        if size not in cls.SIZES:
            raise VgenError(
                f"unknown {cls.__name__} size {size!r}{nearest(size, cls.SIZES)}; known sizes: {', '.join(cls.SIZES)}"
            )
        return dict(cls.SIZES[size])

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> Self:
        """A model with fresh weights of a named size; `changes` are keyword arguments of the constructor."""
        return cls(**{**cls.size_config(size), **changes})
