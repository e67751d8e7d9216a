"""What a router tells the controller of its load."""

from cluster.names import RouterId
from router.load_meter import LoadMeter


def test_answers_that_failed_do_not_count_for_the_length_of_answers() -> None:
    meter = LoadMeter()
    for _ in range(3):
        meter.arrive(100)
    meter.end(20, is_success=True)
    meter.end(7, is_success=False)
    load = meter.load(RouterId("r"), 5.0)
    assert (load.arrived, load.finished, load.failed) == (3, 1, 1)
    assert (load.prompt_tokens, load.output_tokens) == (300, 20)
