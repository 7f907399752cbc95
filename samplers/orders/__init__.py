"""Decode orders: which positions are decoded in which call. `make_order(name, grid, **options)` makes one."""

from vgen.samplers.orders.base import BaseOrder, FixedOrder, OrderStep, PermutedOrder
from vgen.samplers.orders.registry import ORDERS, Option, OrderKind, make_order, read_order, register_order

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
