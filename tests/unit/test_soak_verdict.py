"""The judge of the soak: it must not call something level that grows."""

from dataclasses import replace

from tests.soak_verdict import Sample, Vitals, courses

MIB = 1 << 20
LEVEL = Sample(0, {"w": Vitals(50 * MIB, 40 * MIB, 30, 1)}, 0, 2, 0)


def uneven(samples: list[Sample]) -> list[str]:
    return [course.name for course in courses(samples, 4 * MIB) if not course.is_flat]


def test_what_stays_or_only_wavers_is_flat() -> None:
    dip = replace(LEVEL, lasting={"w": Vitals(54 * MIB, 40 * MIB, 40, 3)}, num_segments=5)
    assert uneven([LEVEL] * 9) == [] == uneven([LEVEL, dip, *[LEVEL] * 6, dip])


def test_memory_and_files_may_grow_by_the_tolerance_and_arenas_not_at_all() -> None:
    later = replace(LEVEL, lasting={"w": Vitals(54 * MIB, 44 * MIB, 32, 1)})
    assert uneven([LEVEL, LEVEL, later]) == []
    later = replace(LEVEL, lasting={"w": Vitals(54 * MIB + 1, 44 * MIB + 1, 33, 2)})
    names = ["w: open files", "w: arenas mapped", "w: RSS", "w: PSS without files"]
    assert uneven([LEVEL, LEVEL, later]) == names


def test_a_block_or_a_segment_that_is_not_given_back_is_seen() -> None:
    later = replace(LEVEL, blocks_missing=1, num_segments=3, num_names=1)
    assert len(uneven([LEVEL, LEVEL, later])) == 3
