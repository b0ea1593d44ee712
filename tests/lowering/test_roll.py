"""The update of the scale state as one kernel, in Triton's interpreter, against the arena's own."""

from __future__ import annotations

STEPS = """
    import copy, torch
    from te_dynamo.lowering.kernels import roll
    from te_dynamo.recipe import DelayedScaling
    from te_dynamo.state.arena import Arena

    torch.manual_seed(0)
    recipes = [DelayedScaling(amax_history_len=5), DelayedScaling(amax_history_len=1, margin=1),
               DelayedScaling(amax_history_len=7, amax_compute_algo="most_recent"), DelayedScaling(amax_history_len=3, like_te=True)]
    one = Arena(torch.device("cpu"))
    for i, recipe in enumerate(recipes):
        for direction in (0, 1):
            one.configure(direction, one.take(direction, 3), recipe)
    one.unite(0, [1, 2])
    two = copy.deepcopy(one)

    def by_kernel(amax, scale, history, cursor):
        if two.has_unions:
            union = two.union[:, : amax.shape[1]]
            amax = torch.zeros_like(amax).scatter_reduce(1, union, amax, "amax").gather(1, union)
        roll.launch(amax, scale, history, cursor, two.top, two.limit, two.length, two.most_recent)

    two.advance = by_kernel
    n = one.used[0]
    for step in range(20):
        amax = torch.rand(2, n) * 10.0 ** torch.randint(-44, 39, (2, n)) * (torch.rand(2, n) > 0.3)
        amax[:, 0] = 0
        if step % 4 == 1:
            amax[:, torch.randint(1, n, (3,))] = torch.inf
        for arena in (one, two):
            arena.amax[:, :n] = amax
            arena.roll()
        for name in ("scale", "history", "cursor", "amax"):
            a, b = getattr(one, name), getattr(two, name)
            assert torch.equal(a, b), (step, name, (a != b).nonzero())
    print("equal", int((one.scale > 0).sum()))
"""


def test_it_is_the_arena_s_update(interpreter):
    assert interpreter(STEPS).split() == ["equal", "24"]
