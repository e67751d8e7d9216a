"""What the model's section turns into for vLLM's front-end, and what it refuses."""

from typing import Any

import pytest

from cluster import config
from cluster.config import ModelSection
from cluster.errors import ConfigError

# vLLM uses what it has itself deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def section(**settings: Any) -> ModelSection:
    return ModelSection(path=str(config.BUNDLED_MODEL), **settings)


def test_settings_reach_the_front_end() -> None:
    from router.app import build_vllm_config, frontend_arguments

    model = section(
        served_name="mine",
        max_model_len=256,
        engine_args={"reasoning_parser": "deepseek_r1", "tensor_parallel_size": 2},
        frontend_args={"chat_template": "{{ messages }}", "response_role": "oracle"},
    )
    vllm_config = build_vllm_config(model)
    arguments = frontend_arguments(model, vllm_config)
    assert vllm_config.model_config.max_model_len == 256
    assert vllm_config.device_config.device_type == "cpu"
    assert vllm_config.kv_transfer_config is None
    assert arguments.served_model_name == ["mine"]
    assert arguments.structured_outputs_config.reasoning_parser == "deepseek_r1"
    assert (arguments.chat_template, arguments.response_role) == ("{{ messages }}", "oracle")
    assert not arguments.enable_log_requests


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"frontend_args": {"tool_parser": "hermes"}}, r"frontend_args.tool_parser.*tool_call_par"),
        ({"frontend_args": {"enable_auto_tool_choice": True}}, "requires --tool-call-parser"),
        ({"frontend_args": {"chat_template": "/no/such/file"}}, "chat template"),
        ({"engine_args": {"max_len": 3}}, "model.engine_args: .*max_len"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], told: str) -> None:
    from router.app import build_vllm_config, frontend_arguments

    with pytest.raises(ConfigError, match=told):
        model = section(**settings)
        frontend_arguments(model, build_vllm_config(model))
