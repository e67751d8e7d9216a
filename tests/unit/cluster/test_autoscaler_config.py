"""The autoscaler's section: every impossible setting is one clear line when it is loaded."""

from typing import Any

import pytest

from cluster.autoscaler_config import AutoscalerSection, CalendarWindow
from cluster.config import TandemConfig, parse_config
from cluster.errors import ConfigError

NIGHT = {"start": "22:00", "end": "06:00", "prefill": 1, "decode": 1}


def error_of(autoscaler: dict[str, Any], **other: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({"autoscaler": autoscaler, **other})
    return str(caught.value)


@pytest.mark.parametrize(
    ("autoscaler", "says"),
    [
        ({"ratio": "0:1"}, "autoscaler.ratio: neither side of a ratio may be 0"),
        ({"ratio": "1:00"}, "autoscaler.ratio: neither side of a ratio may be 0"),
        ({"ratio": "2"}, "autoscaler.ratio: String should match"),
        ({"min_decode": 9}, "autoscaler: min_decode (9) is above max_decode (8): lower one"),
        ({"ratio": "9:1"}, "no sizes within the bounds have ratio 9:1: widen min_*/max_*"),
        ({"signal": "vibes"}, "autoscaler.signal: Input should be 'decode_tps'"),
        ({"mode": "act"}, "signal decode_tps needs target_per_worker: set it, or run"),
        ({"signal": "tbt"}, "signal tbt needs slo_tbt_s"),
        ({"signal": "decode_util", "target_per_worker": 80}, "give a share of 1"),
        ({"severe_latency": 1.0}, "severe_latency must be above moderate_latency"),
        ({"in_latency_guard": 1.1}, "in_latency_guard must not be above"),
        ({"ratio_estimation": True}, "ratio_estimation needs ratio_lengths"),
        ({"calendar_timezone": "Mars/Olympus"}, "autoscaler.calendar_timezone: unknown time zone"),
        ({"calendar": [{**NIGHT, "start": 600}]}, 'put the time in quotes, as "10:00"'),
        ({"calendar": [{**NIGHT, "days": ["someday"]}]}, "autoscaler.calendar.0.days.0"),
        ({"calendar": [{**NIGHT, "days": []}]}, "autoscaler.calendar.0.days"),
        ({"calendar": [{**NIGHT, "decode": 9}]}, "calendar.0 (mon,tue,wed,thu,fri,sat,sun 22:00-"),
        ({"calendar": [NIGHT, {**NIGHT, "start": "05:59"}]}, "overlap: move or merge one"),
        ({"cooldown_in_s": 0}, "autoscaler.cooldown_in_s"),
        ({"speedup": 0.5}, "autoscaler.speedup"),
        ({"colldown_in_s": 1}, "nearest valid key: autoscaler.cooldown_in_s"),
    ],
)
def test_an_impossible_setting_is_refused_with_the_way_out(
    autoscaler: dict[str, Any], says: str
) -> None:
    assert says in error_of(autoscaler)


def test_faults_of_the_whole_section_do_not_print_it() -> None:
    assert "(got" not in error_of({"min_decode": 9})


def test_every_fault_of_the_section_is_named_at_once() -> None:
    error = error_of({"min_decode": 9, "severe_latency": 1.0})
    assert "max_decode" in error and "severe_latency" in error


def test_a_budget_below_the_smallest_pools_is_refused() -> None:
    gpus = {"gpus_per_worker": 2}
    error = error_of({"gpu_budget": 3}, prefill=gpus, decode=gpus)
    assert error.startswith("autoscaler.gpu_budget (3) is below the 4 GPUs of min_prefill")
    windows = [{**NIGHT, "prefill": 2, "decode": 2}]
    error = error_of({"gpu_budget": 5, "calendar": windows}, prefill=gpus, decode=gpus)
    assert "8 GPUs of calendar window" in error


def test_without_a_target_the_autoscaler_is_off() -> None:
    assert TandemConfig().autoscaler.mode == "off"


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        (("sun", "22:00", "06:00"), ("mon", "05:00", "07:00"), True),
        (("sun", "22:00", "06:00"), ("mon", "06:00", "07:00"), False),
        (("mon", "00:00", "00:00"), ("mon", "23:59", "00:00"), True),
        (("mon", "00:00", "00:00"), ("tue", "00:00", "01:00"), False),
        (("mon", "08:00", "20:00"), ("mon", "10:00", "11:00"), True),
    ],
)
def test_windows_overlap_across_midnight_and_the_week(
    one: tuple[str, str, str], other: tuple[str, str, str], overlap: bool
) -> None:
    first, second = (
        CalendarWindow.model_validate(
            {"days": [day], "start": start, "end": end, "prefill": 1, "decode": 1}
        )
        for day, start, end in (one, other)
    )
    assert first.overlaps(second) is second.overlaps(first) is overlap


def test_speed_divides_times_but_leaves_windows_room_for_reports() -> None:
    section = AutoscalerSection(speedup=120)
    assert section.scaled(section.cooldown_in_s) == 5
    assert section.window(section.length_window_s) == 15
    assert section.window(section.metric_window_s) == 3
    assert section.window(1.0) == 1.0
