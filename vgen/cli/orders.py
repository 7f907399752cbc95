"""`vgen orders`: draw decode orders, count their calls, list their options."""

from __future__ import annotations

import argparse
from pathlib import Path

from vgen.cli.arguments import whole, writable_file
from vgen.errors import VgenError
from vgen.plugins import load_installed, registered
from vgen.samplers.orders import ORDERS, make_order, read_order

EPILOG = """examples:
  vgen orders                                             # the table only
  vgen orders --grid 1x16x16 --out orders.png             # all orders side by side
  vgen orders --grid 24x24 --order regions-9 --order zip:window=4 --order locality-20 --out three.png --gif three.gif
  vgen orders --grid 4x8x8 --order frames-confidence-8 --gif video.gif
  vgen orders --grid 8x8 --order given:source=my_order.json --out mine.png

an order is written NAME, NAME-VALUE (its first option) or NAME:option=value,option=value
"""
PLUGINS = True

# What is drawn when no --order is given; `frames` joins for videos. `given` needs a file.
GALLERY = (
    "raster",
    "diagonal",
    "neighbor",
    "regions-4",
    "regions-16",
    "zip-3",
    "blocks-4",
    "subsample-4",
    "random",
    "locality",
    "halton",
    "hierarchical",
    "confidence-8",
)
VIDEO_GALLERY = (*GALLERY, "frames-confidence-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--grid", type=_sizes, metavar="TxHxW", default=(1, 16, 16), help="TxHxW, HxW or N positions (default: 1x16x16)"
    )
    parser.add_argument(
        "--order", action="append", metavar="NAME[:opt=val,...]", help="an order; repeat for more (default: all)"
    )
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), metavar="S", help="seed of the orders that have one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw them side by side into this picture")
    parser.add_argument("--gif", type=Path, metavar="FILE.gif", help="animate them, one call at a time")


def check(args: argparse.Namespace) -> None:
    """What can be refused before torch is imported."""
    for name in args.order or ():
        read_order(name)
    writable_file("--out", args.out, (".png", ".webp", ".jpg", ".jpeg"))
    writable_file("--gif", args.gif, (".gif",))


def run(args: argparse.Namespace) -> None:
    from vgen.samplers.types import as_grid
    from vgen.viz.orders import animate, plot_all

    grid = as_grid(args.grid)
    skipped = []
    if args.order:
        orders = [_make(name, grid, args.seed) for name in args.order]
    else:
        orders = []
        load_installed()
        for name in (*(VIDEO_GALLERY if grid[0] > 1 else GALLERY), *registered("order")):
            try:
                orders.append(_make(name, grid, args.seed))
            except VgenError as error:  # not every order divides every grid
                skipped.append(f"left out: {error}")
    print(_table(orders))
    for line in skipped:
        print(line)
    if args.out:
        plot_all(orders, args.out)
        print(f"wrote {args.out}")
    if args.gif:
        animate(orders, args.gif)
        print(f"wrote {args.gif}")


def _sizes(text: str) -> tuple[int, ...]:
    """An argparse type."""
    try:
        sizes = tuple(int(side) for side in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"a grid is written TxHxW, HxW or N, such as 1x16x16; got {text!r}")
    return sizes


def _make(name: str, grid: tuple[int, int, int], seed: int | None):
    seeded = seed is not None and "seed" in ORDERS[read_order(name)[0]].options
    return make_order(name, grid, **({"seed": seed} if seeded else {}))


def _table(orders) -> str:
    """Name, calls, mean tokens per call, what it does, paper; then the options of the orders shown."""
    from vgen.samplers.types import grid_size

    rows = [("order", "calls", "tokens/call", "what it does", "paper")]
    options = []
    for order in orders:
        name = read_order(order.name)[0]
        kind = ORDERS[name]
        mean = grid_size(order.grid) / order.calls
        rows.append((order.name, str(order.calls), f"{mean:.1f}", kind.summary, kind.paper))
        options += [(name, f"{key}={_written(option.default)}", option.help) for key, option in kind.options.items()]
    lines = _aligned(rows, right=(1, 2))
    if options:
        lines += ["", "options", *_aligned(list(dict.fromkeys(options)))]
    return "\n".join(lines)


def _written(value) -> str:
    """An option's default as it would be typed."""
    return "…" if value is None else "x".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def _aligned(rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = [
        [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]
