"""Every order on arbitrary grids: each position once, closed-form call counts, known tokens, seeds, batches."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen.errors import VgenError
from vgen.samplers.orders import ORDERS, FixedOrder, make_order, read_order
from vgen.samplers.orders.locality import PUBLISHED_REPULSION
from vgen.samplers.types import Canvas, Draw, grid_coordinates, grid_size

GRIDS = st.one_of(
    st.tuples(st.just(1), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(2, 4), st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.just(1), st.just(1), st.integers(1, 40)),
)

# name -> calls on a (T, H, W) grid of N positions
CLOSED_FORMS = {
    "raster": lambda t, h, w: t * h * w,
    "diagonal": lambda t, h, w: t * h * w,
    "diagonal-oneway": lambda t, h, w: t * h * w,
    "diagonal:first=down": lambda t, h, w: t * h * w,
    "neighbor": lambda t, h, w: t + h + w - 2,
    "regions-1": lambda t, h, w: t * h * w,
    "zip-1": lambda t, h, w: t * (w + h - 1),
    "zip-3": lambda t, h, w: t * (w + (h - 1) * min(3, w)),
    "zip-99": lambda t, h, w: t * h * w,
    "blocks-2": lambda t, h, w: t * math.ceil(h / 2) * math.ceil(w / 2),
    "blocks-1x3": lambda t, h, w: t * h * math.ceil(w / 3),
    "subsample-2": lambda t, h, w: t * min(h, 2) * min(w, 2),
    "subsample-3x1": lambda t, h, w: t * min(h, 3),
    "hierarchical": lambda t, h, w: (max(t, h, w) - 1).bit_length() + 1,
    "frames": lambda t, h, w: t * h * w,
    "frames-neighbor": lambda t, h, w: t * (h + w - 1),
    **dict.fromkeys(("random", "locality", "halton", "confidence", "frames-confidence", "frames-random")),
}
NAMES = st.sampled_from(list(CLOSED_FORMS))


class Zeros:
    """Noise of nothing, for confidence orders."""

    def gumbel(self, stream, step, shape):
        return torch.zeros(*shape)


def run(order, canvas, score=None):
    """Drives `canvas` through the order as the decode loop does; returns the steps. Values record the step of a write."""
    steps = []
    for step in order.steps(canvas):
        targets = step.targets.expand(canvas.batch, -1)
        assert not canvas.known.gather(1, targets).any(), "a known position is predicted again"
        values = torch.full(targets.shape, step.index)
        draw = Draw(values, torch.zeros(targets.shape) if score is None else score(step, targets))
        canvas.write(step.targets, values, order.keep(step, draw, canvas, Zeros()), step.keep)
        steps.append(step)
    return steps


def same_steps(steps, others):
    return len(steps) == len(others) and all(
        torch.equal(a.targets, b.targets) and a.unknown == b.unknown for a, b in zip(steps, others)
    )


@given(GRIDS, NAMES)
def test_every_position_once_and_closed_form_calls(grid, name):
    order = make_order(name, grid)
    positions = torch.cat(order.groups())
    assert positions.sort().values.tolist() == list(range(grid_size(grid)))
    assert len(order.groups()) == order.calls
    if CLOSED_FORMS[name]:
        assert order.calls == CLOSED_FORMS[name](*grid)


@given(GRIDS, NAMES)
def test_steps_fill_the_canvas_and_agree_with_step_ids(grid, name):
    order = make_order(name, grid)
    canvas = Canvas.blank(grid, 2)
    steps = run(order, canvas)
    assert canvas.known.all()
    assert [step.index for step in steps] == list(range(order.calls))
    assert {step.total for step in steps} == {order.calls}
    assert sum(step.keep for step in steps) == grid_size(grid)
    assert all(step.unknown[0] - step.unknown[1] == step.keep for step in steps)
    assert steps[-1].unknown[1] == 0
    assert steps[-1].closes
    ids = order.step_ids()
    assert (ids.min(), ids.max()) == (0, order.calls - 1)
    if "confidence" not in name:
        assert torch.equal(ids, canvas.values[0])
        assert torch.equal(torch.cat(order.groups()).gather(0, torch.arange(1)), steps[0].targets.reshape(-1)[:1])


@given(GRIDS, NAMES, st.data())
def test_known_positions_are_skipped(grid, name, data):
    size = grid_size(grid)
    count = data.draw(st.integers(0, size))
    masks = [data.draw(st.permutations([True] * count + [False] * (size - count))) for _ in range(2)]
    if name.startswith("frames"):
        masks[1] = masks[0]  # frames need equal counts in every frame
    canvas = Canvas.blank(grid, 2)
    canvas.known |= torch.tensor(masks)
    before = canvas.known.clone()
    canvas.values -= 1
    order = make_order(name, grid)
    steps = run(order, canvas)
    assert canvas.known.all()
    assert (canvas.values[before] == -1).all(), "a known value was overwritten"
    assert sum(step.keep for step in steps) == size - count
    assert len(steps) <= order.calls
    assert [step.total for step in steps] == [len(steps)] * len(steps)
    assert all(step.start_unknown >= step.unknown[0] > step.unknown[1] >= 0 for step in steps)


@given(GRIDS, st.sampled_from([n for n in CLOSED_FORMS if "confidence" not in n]), st.data())
@settings(max_examples=50)
def test_a_sample_does_not_depend_on_its_batch(grid, name, data):
    order = make_order(name, grid)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=grid_size(grid), max_size=grid_size(grid))))
    together, alone = Canvas.blank(grid, 5), Canvas.blank(grid, torch.tensor([3]))
    together.known |= mask
    alone.known |= mask
    run(order, together)
    run(order, alone)
    assert torch.equal(together.values[3:4], alone.values)


@pytest.mark.parametrize("name", ["random", "locality", "frames-random"])
def test_seed_and_sample_decide_the_permutation(name):
    grid = (2, 4, 5)

    def ids(seed, samples):
        canvas = Canvas.blank(grid, torch.tensor(samples))
        run(make_order(name, grid, seed=seed), canvas)
        return canvas.values

    assert torch.equal(ids(7, [0, 1]), ids(7, [0, 1]))
    assert not torch.equal(ids(7, [0]), ids(7, [1]))
    assert not torch.equal(ids(7, [0]), ids(8, [0]))
    assert torch.equal(make_order(name, grid, seed=7).step_ids(), ids(7, [0])[0])


def test_frames_of_random_orders_differ():
    ids = make_order("frames-random", (2, 6, 6)).step_ids().view(2, 36)
    assert not torch.equal(ids[0], ids[1] - ids[1].min())


@pytest.mark.parametrize("name", ["random", "locality", "confidence", "frames-random", "frames-confidence"])
def test_step_ids_come_from_the_generator(name):
    order = make_order(name, (2, 4, 4))
    first, again = (order.step_ids(torch.Generator().manual_seed(5)) for _ in range(2))
    other = order.step_ids(torch.Generator().manual_seed(6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@given(GRIDS, st.data())
def test_regions_for_every_n_that_fits(grid, data):
    height, width = grid[1:]
    n = data.draw(
        st.sampled_from(
            [a * b for a in range(1, height + 1) for b in range(1, width + 1) if height % a == width % b == 0]
        )
    )
    order = make_order("regions", grid, n=n)
    assert order.calls == n + grid_size(grid) // n - 1
    steps = run(order, Canvas.blank(grid, 1))
    assert [step.phase for step in steps] == [0] * n + [1] * (order.calls - n)
    assert [step.size for step in steps] == [1] * n + [n] * (order.calls - n)
    assert steps[0].start_unknown == n
    if order.calls > n:
        assert steps[n].unknown[0] == grid_size(grid) - n


def test_regions_published_calls():
    assert make_order("regions-4", (24, 24)).calls == 147
    assert make_order("regions-16", (24, 24)).calls == 51
    assert make_order("regions-4", (5, 16, 16)).calls == 323
    assert make_order("regions-16", (5, 16, 16)).calls == 95
    assert torch.cat(make_order("regions-4", (4, 4)).groups()).tolist() == [
        0,
        2,
        8,
        10,
        1,
        3,
        9,
        11,
        4,
        6,
        12,
        14,
        5,
        7,
        13,
        15,
    ]


@given(st.integers(1, 12), st.integers(1, 12))
def test_zigzag_neighbours_touch(height, width):
    order = torch.cat(make_order("diagonal", (height, width)).groups())
    cells = torch.stack((order // width, order % width), dim=1)
    assert (cells.diff(dim=0).abs() <= 1).all()
    transposed = torch.cat(make_order("diagonal:first=down", (width, height)).groups())
    assert torch.equal(transposed, cells[:, 1] * height + cells[:, 0])


@given(st.integers(1, 9), st.integers(1, 9))
def test_zip_is_a_wavefront_at_one_and_raster_at_full_width(height, width):
    grid = (height, width)
    assert torch.equal(make_order("zip-1", grid).step_ids(), make_order("neighbor", grid).step_ids())
    assert torch.equal(make_order("zip", grid, window=width).step_ids(), make_order("raster", grid).step_ids())


@given(st.integers(1, 8), st.integers(2, 9), st.integers(2, 9))
def test_zip_window_rule(height, width, window):
    ids = make_order("zip", (height, width), window=window).step_ids().view(height, width)
    for row in range(1, height):
        there = (ids[row - 1] < ids[row, 0]).sum()
        assert there == min(window, width)


@given(st.integers(1, 9), st.integers(3, 9), st.data())
def test_faithful_zip_calls_and_feeds(height, width, data):
    window = data.draw(st.integers(2, width))
    order = make_order("zip", (height, width), window=window, faithful=True)
    assert order.calls == (height * width if window == width or height == 1 else 2 * width + (height - 2) * window)
    known = torch.zeros(height * width, dtype=torch.bool)
    for step in order.steps(Canvas.blank(order.grid, 1)):
        assert known[step.feed.source[step.feed.source >= 0]].all(), "a value is fed before it is decoded"
        assert (step.feed.slot[step.feed.reads] == step.targets - 1).all()
        known[step.targets] = True
    assert known.all()


def test_faithful_zip_needs_an_empty_canvas():
    canvas = Canvas.blank((1, 4, 4), 1)
    canvas.known[:, 3] = True
    with pytest.raises(VgenError, match="empty canvas"):
        list(make_order("zip:faithful=true", (4, 4)).steps(canvas))


def test_neighbor_in_three_dimensions_follows_the_distance():
    grid = (3, 4, 5)
    assert torch.equal(make_order("neighbor", grid).step_ids(), grid_coordinates(grid).sum(dim=1))


def test_blocks_follow_xar():
    side, cells = 8, 2
    inner = side // cells
    expected = [
        (row * inner + y) * side + column * inner + x
        for row in range(cells) for column in range(cells) for y in range(inner) for x in range(inner)
    ]  # fmt: skip
    assert torch.cat(make_order("blocks", (side, side), size=inner).groups()).tolist() == expected


@given(
    GRIDS.filter(lambda grid: grid_size(grid) > 1),
    st.sampled_from(["random", "halton", "locality", "confidence"]),
    st.data(),
)
def test_free_step_counts(grid, name, data):
    steps = data.draw(st.integers(1, grid_size(grid)))
    order = make_order(name, grid, steps=steps)
    assert order.calls == steps == len(order.groups())
    known = data.draw(st.integers(0, grid_size(grid) - 1))
    canvas = Canvas.blank(grid, 1)
    canvas.known[:, :known] = True
    taken = len(run(order, canvas))
    # halton is fixed: its groups lose their known positions, the others spread the unknown ones anew
    assert taken <= steps if name == "halton" else taken == min(steps, grid_size(grid) - known)


def test_halton_prefixes_are_even():
    """Of the first quarter of the order about a quarter lies in every quadrant."""
    order = torch.cat(make_order("halton", (16, 16)).groups())[:64]
    quadrant = (order // 16 >= 8) * 2 + (order % 16 >= 8)
    assert quadrant.bincount(minlength=4).sub(16).abs().max() <= 2


def test_hierarchical_levels():
    assert [len(group) for group in make_order("hierarchical", (16, 16)).groups()] == [1, 3, 12, 48, 192]


def test_locality_keeps_its_distance_and_its_neighbourhood():
    order = make_order("locality-20", (16, 16))
    assert order.repulsion == PUBLISHED_REPULSION[256, 20]
    decoded = np.zeros((16, 16), dtype=bool)
    for index, group in enumerate(order.groups()[:10]):
        cells = np.stack(np.divmod(group.numpy(), 16), axis=1)
        apart = np.abs(cells[:, None] - cells[None]).max(axis=2) + 99 * np.eye(len(cells))
        assert apart.min() > order.repulsion
        near = [decoded[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].any() for y, x in cells]
        assert index == 0 or sum(near) >= min(len(near), 1)
        decoded[tuple(cells.T)] = True


def test_locality_starts_from_known_positions():
    canvas = Canvas.blank((1, 8, 8), 1)
    canvas.known[:, :16] = True  # two rows
    first = next(iter(make_order("locality-16", (8, 8)).steps(canvas)))
    assert (first.targets // 8 == 2).all()  # the row below them is the only one with neighbours


def test_confidence_keeps_the_best_and_breaks_ties_by_position():
    order = make_order("confidence", (1, 1, 12), steps=3, schedule="linear")
    canvas = Canvas.blank(order.grid, 1)
    favourite = torch.tensor([0, 0, 5, 0, 0, 5, 0, 0, 0, 5, 0, 5.0])
    steps = run(order, canvas, lambda step, targets: favourite[targets])
    assert [(step.size, step.keep) for step in steps] == [(12, 4), (8, 4), (4, 4)]
    assert (canvas.values[0] == 0).nonzero()[:, 0].tolist() == [2, 5, 9, 11]
    assert (canvas.values[0] == 1).nonzero()[:, 0].tolist() == [0, 1, 3, 4]


def test_confidence_noise_is_annealed_within_each_frame():
    scales = []

    class Ones:
        def gumbel(self, stream, step, shape):
            scales.append(step.ratio)
            return torch.ones(*shape)

    order = make_order("frames-confidence-4", (2, 3, 3))
    canvas = Canvas.blank(order.grid, 1)
    for step in order.steps(canvas):
        draw = Draw(torch.zeros(1, step.size, dtype=torch.long), torch.zeros(1, step.size))
        canvas.write(step.targets, draw.values, order.keep(step, draw, canvas, Ones()), step.keep)
    assert scales == [0.25, 0.5, 0.75] * 2  # the last call of a frame keeps everything


def test_confidence_orders_may_follow_the_released_rule():
    order = make_order("confidence", (1, 1, 6), steps=9, schedule="maskgit")
    canvas = Canvas.blank((1, 1, 6), 2)
    found = [(step.size, step.keep) for step in run(order, canvas)]
    assert found == [(6, 1), (5, 1), (4, 1), (3, 1), (2, 1), (1, 0), (1, 0), (1, 0), (1, 1)] and canvas.known.all()
    with pytest.raises(VgenError, match="1 to 6 steps"):
        make_order("confidence", (1, 1, 6), steps=9)


@pytest.mark.parametrize("name", ["confidence-3", "confidence:steps=9,schedule=maskgit,temperature=9.5"])
def test_names_of_confidence_orders_make_them_again(name):
    order = make_order(name, (1, 1, 6))
    again = make_order(order.name, (1, 1, 6))
    assert order.name == name and (again.name, again.calls, again.temperature) == (name, order.calls, order.temperature)


def test_confidence_needs_a_score():
    order = make_order("confidence-2", (2, 2))
    canvas = Canvas.blank(order.grid, 1)
    step = next(iter(order.steps(canvas)))
    with pytest.raises(VgenError, match="score"):
        order.keep(step, Draw(torch.zeros(1, 4)), canvas, Zeros())


def test_frames_close_and_count_within_the_frame():
    steps = run(make_order("frames-blocks-2", (3, 4, 4)), Canvas.blank((3, 4, 4), 2))
    assert [step.closes for step in steps] == [False, False, False, True] * 3
    assert [step.unknown[0] for step in steps] == [16, 12, 8, 4] * 3


def test_frames_skip_given_frames():
    canvas = Canvas.blank((3, 4, 4), 2)
    canvas.known[:, :16] = True  # image to video
    steps = run(make_order("frames-confidence-4", (3, 4, 4)), canvas)
    assert len(steps) == 8
    assert min(int(step.targets.min()) for step in steps) == 16


@pytest.mark.parametrize(("name", "ends"), [("raster", [3, 7]), ("neighbor", [2, 3]), ("zip-1", [2, 5])])
def test_fixed_orders_close_every_frame(name, ends):
    steps = list(make_order(name, (2, 2, 2)).steps(Canvas.blank((2, 2, 2), 1)))
    assert [step.index for step in steps if step.closes] == ends


def test_equal_group_counts_keep_the_groups_of_a_fixed_order():
    """Different masks with equally many unknown positions in every row: rows stay rows."""
    order = FixedOrder("rows", (1, 3, 4), torch.arange(12).split(4))
    canvas = Canvas.blank(order.grid, 2)
    canvas.known[0, [0, 4]] = True
    canvas.known[1, [3, 6]] = True
    steps = run(order, canvas)
    assert [step.keep for step in steps] == [3, 3, 4]
    assert steps[1].targets.tolist() == [[5, 6, 7], [4, 5, 7]]


def test_unequal_group_counts_are_cut_in_proportion():
    order = FixedOrder("rows", (1, 3, 4), torch.arange(12).split(4))
    canvas = Canvas.blank(order.grid, 2)
    canvas.known[0, :4] = True
    canvas.known[1, 8:] = True
    steps = run(order, canvas)
    assert sum(step.keep for step in steps) == 8
    assert steps[0].targets.shape == (2, steps[0].keep)
    assert canvas.known.all()


def test_unequal_masks_and_wrong_grids_are_errors():
    canvas = Canvas.blank((1, 2, 2), 2)
    canvas.known[0, 0] = True
    for name in ("raster", "random", "confidence"):
        with pytest.raises(VgenError, match="equally many"):
            list(make_order(name, (2, 2)).steps(canvas))
        with pytest.raises(VgenError, match="grid 1x3x3"):
            list(make_order(name, (3, 3)).steps(canvas))


def test_a_known_canvas_needs_no_step():
    for name in CLOSED_FORMS:
        canvas = Canvas.blank((1, 3, 3), 2)
        canvas.known |= True
        assert list(make_order(name, (3, 3)).steps(canvas)) == []


# ---- names, options, files ---------------------------------------------------------------------------------------------


@given(GRIDS, NAMES)
def test_the_name_of_an_order_makes_it_again(grid, name):
    order = make_order(name, grid)
    again = make_order(order.name, grid)
    assert (again.name, again.calls) == (order.name, order.calls)


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_is_described(name):
    kind = ORDERS[name]
    assert kind.summary
    assert kind.paper
    assert kind.short is None or kind.short in kind.options
    assert all(option.help for option in kind.options.values())


def test_options_as_text_and_as_values_agree():
    grid = (1, 8, 8)
    for text, options in [
        ("regions-16", {"n": 16}),
        ("zip:window=2", {"window": 2}),
        ("blocks-4x2", {"size": (4, 2)}),
        ("random:steps=5,schedule=linear,seed=3", {"steps": 5, "schedule": "linear", "seed": 3}),
        ("locality:repulsion=1,steps=9", {"repulsion": 1.0, "steps": 9}),
    ]:
        kind = read_order(text)[0]
        assert torch.equal(make_order(text, grid).step_ids(), make_order(kind, grid, **options).step_ids())
    assert make_order("random-7", 30, schedule="linear").calls == 7
    assert make_order("random", 30, steps=None).calls == make_order("random", 30).calls
    inner = make_order("frames-confidence:steps=3,schedule=linear", (2, 4, 4))
    assert [step.keep for step in inner.steps(Canvas.blank((2, 4, 4), 1))] == [5, 5, 6] * 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rastr", {}, "did you mean 'raster'"),
        ("raster", {"steps": 3}, "no option 'steps'"),
        ("regions", {"m": 3}, "it has n"),
        ("regions", {"n": 3}, "n can be 1, 2, 4"),
        ("regions-4", {"n": 4}, "already says"),
        ("raster-4", {}, "takes no value"),
        ("random", {"steps": 0}, "whole number of at least 1"),
        ("random", {"steps": 2.5}, "whole number of at least 1"),
        ("random", {"steps": 17}, "1 to 16"),
        ("locality", {"steps": 17}, "1 to 16"),
        ("confidence", {"steps": "many"}, "whole number"),
        ("random", {"schedule": "cosin"}, "one of cosine"),
        ("random", {"seed": -1}, "at least 0"),
        ("confidence", {"temperature": float("nan")}, "at least 0"),
        ("blocks-2x", {}, "height x width"),
        ("zip", {"faithful": "perhaps"}, "true or false"),
        ("zip", {"window": 1, "faithful": True}, "at least 2"),
        ("frames-frames", {}, "cannot be 'frames'"),
        ("random:steps", {}, "name:option=value"),
        ("given", {}, "source"),
    ],
)
def test_bad_orders_are_one_sentence(name, options, message):
    with pytest.raises(VgenError, match=message):
        make_order(name, (4, 4), **options)


def test_given_orders(tmp_path):
    grid = (1, 2, 3)
    permutation = [5, 0, 4, 1, 3, 2]
    (tmp_path / "order.json").write_text(json.dumps(permutation))
    (tmp_path / "lines.txt").write_text("\n".join(map(str, permutation)))
    np.save(tmp_path / "order.npy", np.array(permutation))
    for source in (
        permutation,
        torch.tensor(permutation),
        *(tmp_path / n for n in ("order.json", "lines.txt", "order.npy")),
    ):
        order = make_order("given", grid, source=source)
        assert torch.cat(order.groups()).tolist() == permutation
        assert order.calls == 6
    assert [len(g) for g in make_order("given", grid, source=permutation, sizes="1+2+3").groups()] == [1, 2, 3]
    assert make_order("given", grid, source=permutation, steps=2).calls == 2

    groups = [[5, 0], [4], [1, 3, 2]]
    (tmp_path / "groups.txt").write_text("5 0\n4\n1, 3, 2\n")
    (tmp_path / "groups.json").write_text(json.dumps({"groups": groups}))
    for source in (groups, tmp_path / "groups.txt", str(tmp_path / "groups.json")):
        assert [g.tolist() for g in make_order("given", grid, source=source).groups()] == groups

    table = [[0, 4, 4], [9, 0, 4]]
    (tmp_path / "table.txt").write_text("0 4 4\n9 0 4\n")
    np.save(tmp_path / "table.npy", np.array(table))
    for source in (table, np.array(table), {"steps": table}, tmp_path / "table.txt", tmp_path / "table.npy"):
        assert make_order("given", grid, source=source).step_ids().tolist() == [0, 1, 1, 2, 0, 1]
    assert make_order(f"given-{tmp_path / 'table.npy'}", grid).calls == 3

    each_once = [[0, 1, 2], [3, 4, 5]]  # a list: two groups; an array in the grid's shape: a step table
    assert make_order("given", grid, source=each_once).calls == 2
    assert make_order("given", grid, source=np.array(each_once)).calls == 6
    assert make_order("given", (2, 2, 2), source=[[[0, 1], [1, 0]], [[2, 2], [3, 3]]]).calls == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([0, 1, 2, 3, 4, 4], "5 is missing|4 occurs 2 times"),
        ([0, 1, 2], "3 is missing"),
        ([0, 1, 2, 3, 4, 6], "from 0 to 5, found 6"),
        ([[0, 1], [2, 3]], "4 is missing"),
        ([0.5] * 6, "whole numbers"),
        (["a"] * 6, "whole numbers"),
        ({"permutation": []}, "order, groups, steps"),
        ({"steps": [0, 1]}, "6 numbers, found 2"),
        (7, "found int"),
        ("missing.json", "cannot read"),
        ("order.csv", "ends in"),
    ],
)
def test_bad_given_orders(source, message):
    with pytest.raises(VgenError, match=message):
        make_order("given", (2, 3), source=source)


def test_broken_given_files(tmp_path):
    for name, text in [("a.json", "{"), ("b.txt", "1 2 x"), ("c.npy", "nothing")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(VgenError, match="order file"):
            make_order("given", (2, 3), source=tmp_path / name)


def test_confidence_keeps_the_best_of_scores_and_noise_that_fades():
    """MaskGIT, arXiv 2202.04200: score + 4.5 (1 - (i + 1) / N) · Gumbel, none in the last call."""
    order, draw = make_order("confidence:steps=4,schedule=linear,temperature=4.5", (1, 1, 32)), torch.Generator()
    canvas = Canvas.blank(order.grid, 3)

    class Recorded:
        def gumbel(self, stream, step, shape):
            self.drawn = -torch.rand(shape, generator=draw).log().neg().log()
            return self.drawn

    for index, step in enumerate(order.steps(canvas)):
        noise, targets = Recorded(), step.targets.expand(3, -1)
        score = torch.randn(targets.shape, generator=draw)
        kept = order.keep(step, Draw(torch.zeros_like(targets), score), canvas, noise)
        if index == 3:
            assert kept is None and not hasattr(noise, "drawn")
        else:
            best = (score + 4.5 * (1 - (index + 1) / 4) * noise.drawn).topk(step.keep, dim=1).indices
            assert torch.equal(kept, torch.zeros_like(kept).scatter(1, best, True))
        canvas.write(step.targets, torch.zeros_like(targets), kept, step.keep)
