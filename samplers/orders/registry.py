"""The table of orders, their options, and `make_order`. It imports no torch, so that a command can read an order before anything heavy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vgen.errors import VgenError, nearest
from vgen.plugins import known, register
from vgen.samplers.schedules import CONFIDENCE_SCHEDULE, CONFIDENCE_TEMPERATURE, MASKED_SCHEDULES, SCHEDULES
from vgen.values import real, string, whole

if TYPE_CHECKING:
    from vgen.samplers.orders.base import BaseOrder
    from vgen.samplers.orders.frames import FramesOrder
    from vgen.samplers.types import Grid


@dataclass(frozen=True)
class Reader:
    """How an option's value, or its text on the command line, is read; `parse` raises for anything else."""

    parse: Callable[[Any], Any]
    expects: str


def _whole(low: int) -> Reader:
    def parse(value: Any) -> int:
        return whole(int(value) if isinstance(value, str) else value, "it", low)

    return Reader(parse, f"a whole number of at least {low}")


def _one_of(*names: str) -> Reader:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError
        return value

    return Reader(parse, f"one of {', '.join(names)}")


def _amount(value: Any) -> float:
    return real(float(value) if isinstance(value, str) else value, "it", 0)


def _flag(value: Any) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]


def _cell(value: Any) -> tuple[int, int]:
    sides = tuple(COUNT.parse(side) for side in (value if isinstance(value, (tuple, list)) else str(value).split("x")))
    height, width = sides * 2 if len(sides) == 1 else sides
    return height, width


COUNT = _whole(1)
NATURAL = _whole(0)
AMOUNT = Reader(_amount, "a number of at least 0")
FLAG = Reader(_flag, "true or false")
CELL = Reader(_cell, "a side, or height x width such as 4x2")
SIZES = Reader(
    lambda value: [COUNT.parse(size) for size in (value.split("+") if isinstance(value, str) else value)],
    "sizes such as 1+2+5",
)
TEXT = Reader(str, "a text")
ANYTHING = Reader(lambda value: value, "a value")


@dataclass(frozen=True)
class Option:
    """One option of an order. default None: chosen by the order."""

    default: Any
    reader: Reader
    help: str


@dataclass(frozen=True)
class OrderKind:
    """One row of the table. short: the option that `name-VALUE` sets; nested: VALUE may be an order with options."""

    build: Callable[..., BaseOrder]
    summary: str
    paper: str
    options: dict[str, Option] = field(default_factory=dict)
    short: str | None = None
    nested: bool = False


STEPS = Option(None, COUNT, "number of calls (default: twice the square root of the number of positions)")
SEED = Option(0, NATURAL, "seed of the permutations; every sample has its own")


def _schedule(default: str, *more: str) -> Option:
    names = (*SCHEDULES, *more)
    return Option(default, _one_of(*names), f"sizes of the calls: {', '.join(names)}")


def _from(module: str, name: str) -> Callable[..., BaseOrder]:
    """A function of this package that makes an order; its module is imported when it is called."""

    def build(*args: Any, **options: Any) -> BaseOrder:
        return getattr(import_module(f"vgen.samplers.orders.{module}"), name)(*args, **options)

    return build


def frames_order(grid: Grid, inner: str, seed: int) -> FramesOrder:
    """Frames one after the other, each in the order named `inner` (e.g. 'confidence-8')."""
    from vgen.samplers.orders.frames import FramesOrder

    kind, options = read_order(inner)
    if kind == "frames":
        raise VgenError("the inner order of 'frames' decodes one frame: it cannot be 'frames' itself")
    # A frame must not repeat the permutation of another one.
    seeds = [{"seed": seed * grid[0] + frame} if "seed" in ORDERS[kind].options else {} for frame in range(grid[0])]
    return FramesOrder(grid, [make_order(kind, (1, *grid[1:]), **{**extra, **options}) for extra in seeds])


ORDERS: dict[str, OrderKind] = {
    "raster": OrderKind(_from("fixed", "raster"), "row by row, one token a call", "LlamaGen, arXiv 2406.06525"),
    "diagonal": OrderKind(
        _from("diagonal", "diagonal"),
        "45-degree diagonals, one token a call",
        "DAR, arXiv 2503.11129",
        {
            "way": Option("zigzag", _one_of("zigzag", "oneway"), "zigzag (alternating) or oneway"),
            "first": Option("right", _one_of("right", "down"), "first move: right or down"),
        },
        "way",
    ),
    "neighbor": OrderKind(
        _from("fixed", "neighbor"), "a whole anti-diagonal (or plane) a call", "NAR, arXiv 2503.10696"
    ),
    "regions": OrderKind(
        _from("fixed", "regions"),
        "n regions side by side, one token of each a call",
        "PAR, arXiv 2412.15119",
        {"n": Option(4, COUNT, "number of regions, i.e. tokens a call")},
        "n",
    ),
    "zip": OrderKind(
        _from("zip", "zip_rows"),
        "a row starts once the row above holds a window of tokens",
        "ZipAR, arXiv 2412.04062",
        {
            "window": Option(3, COUNT, "tokens of a row that must be there before the next row starts"),
            "faithful": Option(False, FLAG, "the released LlamaGen schedule with its substitute tokens"),
            "adaptive": Option(
                False, FLAG, "the model decides when a row starts, after at least a window; one picture a batch"
            ),
        },
        "window",
    ),
    "blocks": OrderKind(
        _from("fixed", "blocks"),
        "cells of h x w tokens in raster order, a cell a call",
        "xAR, arXiv 2502.20388",
        {"size": Option((2, 2), CELL, "side of a cell, or height x width such as 4x2")},
        "size",
    ),
    "subsample": OrderKind(
        _from("fixed", "subsample"),
        "every s-th token in both directions, a lattice a call",
        "xAR, arXiv 2502.20388",
        {"stride": Option((4, 4), CELL, "distance of the tokens of a call, or vertical x horizontal such as 4x2")},
        "stride",
    ),
    "random": OrderKind(
        _from("permuted", "random_order"),
        "a random permutation for every sample",
        "RandAR, arXiv 2412.01827; ARPG, arXiv 2503.10568",
        {"steps": STEPS, "schedule": _schedule("cosine"), "seed": SEED},
        "steps",
    ),
    "locality": OrderKind(
        _from("locality", "locality_order"),
        "next to what is decoded, apart within a call",
        "LPD, arXiv 2507.01957",
        {
            "steps": STEPS,
            "proximity": Option(1.0, AMOUNT, "score from which a position counts as next to decoded ones"),
            "repulsion": Option(None, AMOUNT, "distance kept within a call (default: by grid and steps)"),
            "seed": SEED,
        },
        "steps",
    ),
    "halton": OrderKind(
        _from("fixed", "halton"),
        "evenly spread positions (low discrepancy)",
        "Halton scheduler, arXiv 2503.17076",
        {"steps": STEPS, "schedule": _schedule("cosine")},
        "steps",
    ),
    "hierarchical": OrderKind(
        _from("fixed", "hierarchical"),
        "coarse to fine over powers of two",
        "RandAR, arXiv 2412.01827, section on resolution",
        {"steps": Option(None, COUNT, "number of calls (default: one a level)"), "schedule": _schedule("cosine")},
        "steps",
    ),
    "confidence": OrderKind(
        _from("confidence", "confidence_order"),
        "predict all, keep what the model is surest of",
        "MaskGIT, arXiv 2202.04200",
        {
            "steps": STEPS,
            "schedule": _schedule(CONFIDENCE_SCHEDULE, *MASKED_SCHEDULES),
            "temperature": Option(
                CONFIDENCE_TEMPERATURE, AMOUNT, "noise on the confidence in the first call, falling to 0"
            ),
        },
        "steps",
    ),
    "frames": OrderKind(
        frames_order,
        "frame after frame, each in an inner order",
        "Lumos-1, arXiv 2507.08801",
        {"inner": Option("raster", TEXT, "the order inside a frame, e.g. confidence-8"), "seed": SEED},
        "inner",
        nested=True,
    ),
    "given": OrderKind(
        _from("given", "given"),
        "your own: a permutation, groups or a step table",
        "-",
        {
            "source": Option(None, ANYTHING, "a .json, .npy or .txt file (or, in Python, an array)"),
            "sizes": Option(None, SIZES, "group sizes that cut a permutation, e.g. 1+2+5"),
            "steps": Option(None, COUNT, "number of calls a permutation is cut into"),
            "schedule": _schedule("cosine"),
        },
        "source",
        nested=True,
    ),
}


def register_order(name: str, kind: OrderKind) -> None:
    """Adds an order to the table, from a module outside of vgen (see `vgen.plugins`); then `make_order(name, grid)` makes it.

    VgenError: the name is taken or has other signs than small letters, digits and _; the option `short` is none of its options.
    """
    if not isinstance(kind, OrderKind):
        raise VgenError(f"an order is registered as an OrderKind (vgen.samplers.orders), got {kind!r}")
    if kind.short is not None and kind.short not in kind.options:
        raise VgenError(
            f"order {name!r}: short={kind.short!r} is none of its options ({', '.join(kind.options) or 'none'})"
        )
    register(ORDERS, "order", name, kind, kind.build.__module__)


def make_order(name: str, grid: int | tuple[int, ...], **options: Any) -> BaseOrder:
    """The order `name` on `grid`.

    name: a key of `ORDERS`, or with its main option: 'regions-4', 'zip-3', 'blocks-4x2', 'random-32',
    'frames-confidence-8', or with any options as on the command line: 'random:steps=32,schedule=linear'. grid:
    N, (H, W) or (T, H, W).
    options: see `ORDERS[name].options`; None leaves the default. Raises VgenError for an unknown name or option, a
    value out of range, and a grid that the order does not fit.
    """
    kind_name, written = read_order(name)
    kind = ORDERS[kind_name]
    for key, value in options.items():
        if key in written and value is not None:
            raise VgenError(
                f"order {name!r} already says {key}={written[key]}, so {key}={value} cannot be given as well"
            )
    values = {key: option.default for key, option in kind.options.items()}
    for key, value in {**options, **written}.items():
        if key not in kind.options:
            known = f"; it has {', '.join(kind.options)}" if kind.options else "; it has none"
            raise VgenError(
                f"order {kind_name!r} has no option {key!r}{nearest(key, kind.options)}{known}; leave {key!r} out"
            )
        if value is None:
            continue
        try:
            values[key] = kind.options[key].reader.parse(value)
        except (ValueError, TypeError, KeyError) as error:
            expects = kind.options[key].reader.expects
            raise VgenError(f"order {kind_name!r}: {key} must be {expects}, got {value!r}") from error
    from vgen.samplers.types import as_grid

    return kind.build(as_grid(grid), **values)


def read_order(text: str) -> tuple[str, dict[str, str]]:
    """'regions-4' or 'random:steps=8,seed=1' -> (name, options as text). Raises VgenError for an unknown name."""
    head, _, tail = string(text, "the name of an order").partition(":")
    name, dash, value = head.partition("-")
    if not known(ORDERS, name):
        raise VgenError(f"unknown order {name!r}{nearest(name, ORDERS)}; orders: {', '.join(ORDERS)}")
    options: dict[str, str] = {}
    if dash:
        if ORDERS[name].short is None:
            raise VgenError(f"order {name!r} takes no value, got {head!r}")
        if ORDERS[name].nested:
            return name, {ORDERS[name].short: text.partition("-")[2]}
        options[ORDERS[name].short] = value
    for entry in filter(None, tail.split(",")):
        key, equals, value = entry.partition("=")
        if not equals or key in options:
            raise VgenError(f"order options are written name:option=value,option=value, each once; got {text!r}")
        options[key.strip()] = value.strip()
    return name, options
