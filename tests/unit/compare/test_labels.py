"""Names in a plot cover neither each other nor points."""

from disttrain.compare.labels import sides


def test_names_get_out_of_each_others_way() -> None:
    assert sides([(0, 0), (1, 1)], ["a", "b"], 500, 500) == ["top", "top"]
    # the second point is just above the first: the first's name goes below it
    assert sides([(0, 0), (0, 0.03), (1, 1)], ["first", "second", "far"], 500, 500) == ["bottom", "top", "top"]
    crowd = [(0.5 + i / 1000, 0.5 + j / 1000) for i in range(3) for j in range(3)] + [(0.0, 0.0), (1.0, 1.0)]
    assert None in sides(crowd, ["crowded"] * 11, 500, 500)


def test_one_point_and_equal_ones() -> None:
    assert sides([(3, 3)], ["a"], 500, 500) == ["top"]
    assert set(sides([(3, 3), (3, 3)], ["a", "b"], 500, 500)) <= {"top", "bottom", "left", "right", None}
