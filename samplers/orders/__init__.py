"""Decode orders: which positions are decoded in which call. `make_order(name, grid, **options)` makes one."""

from typing import TYPE_CHECKING

from vgen.samplers.orders.registry import ORDERS, Option, OrderKind, make_order, read_order, register_order

if TYPE_CHECKING:
    from vgen.samplers.orders.base import BaseOrder, FixedOrder, OrderStep, PermutedOrder

__all__ = [
    "ORDERS",
    "BaseOrder",
    "FixedOrder",
    "Option",
    "OrderKind",
    "OrderStep",
    "PermutedOrder",
    "make_order",
    "read_order",
    "register_order",
]


def __getattr__(name: str):
    """The classes of orders, on first use: the table of their names is wanted before torch is imported."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vgen.samplers.orders import base

    return getattr(base, name)
