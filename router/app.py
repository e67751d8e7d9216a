"""Step 1 of a request: HTTP in. vLLM's own OpenAI front-end, one app per model.

ExchangeLayer                 identity, body limit, honest status, disconnect
  Surface                     /health /metrics /admin /debug beside the models' routes
    ModelDispatch             by the body's `model`
      vLLM's FastAPI app      over a TandemEngineClient (this file)
"""

import difflib
import logging
from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from vllm.config import DeviceConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.elastic_ep.middleware import ScalingMiddleware
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
from vllm.exceptions import VLLMError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from cluster.config import ModelSection
from cluster.errors import ConfigError
from router.batches import BoundedChatBatches, BoundedCompletions
from router.engine_client import SUPPORTED_TASKS, TandemEngineClient, TokenSource

# The first counts a refused stream as a success: it sits inside the exchange layer. The second
# is for elastic expert parallelism.
_UNUSED_MIDDLEWARE = (PrometheusInstrumentatorMiddleware, ScalingMiddleware)


def build_vllm_config(model: ModelSection) -> VllmConfig:
    """Return the configuration vLLM's front-end needs, on a node with or without a GPU."""
    settings = {
        "model": model.path,
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "seed": model.seed,
        "served_model_name": [model.name],
        **model.engine_args,
    }
    try:
        engine_args = AsyncEngineArgs(**{k: v for k, v in settings.items() if v is not None})
    except TypeError as error:
        raise ConfigError(f"model.engine_args: {error}") from None
    model_config = engine_args.create_model_config()
    # No weights are loaded here; a check of quantised kernels would ask for the GPU.
    model_config.quantization = None
    return VllmConfig(
        model_config=model_config,
        device_config=DeviceConfig(device="cpu"),
        structured_outputs_config=engine_args.create_structured_outputs_config(),
    )


def frontend_arguments(model: ModelSection, vllm_config: VllmConfig) -> Namespace:
    """Return `vllm serve`'s arguments with `model.frontend_args` laid over the defaults."""
    arguments: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    for name, value in model.frontend_args.items():
        if name not in arguments:
            nearest = difflib.get_close_matches(name, vars(arguments), n=1, cutoff=0.0)
            raise ConfigError(
                f"model.frontend_args.{name}: vLLM's front-end has no such argument"
                f" (nearest: {nearest[0]})"
            )
        setattr(arguments, name, value)
    arguments.model = model.path
    arguments.served_model_name = [model.name]
    arguments.structured_outputs_config = vllm_config.structured_outputs_config
    arguments.disable_log_stats = True
    arguments.disable_fastapi_docs = True
    try:
        validate_parsed_serve_args(arguments)
    except (TypeError, ValueError, VLLMError) as error:
        raise ConfigError(f"model.frontend_args: {error}") from None
    return arguments


async def build_frontend(model: ModelSection, flow: TokenSource, max_sequences: int) -> FastAPI:
    """Return vLLM's app for one model, serving through `flow`; a request may run so many
    sequences at a time."""
    # A warning per odd request is a log anyone can fill; our records tell of every request.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    vllm_config = build_vllm_config(model)
    arguments = frontend_arguments(model, vllm_config)
    client = TandemEngineClient(vllm_config, flow, max_sequences)
    app = build_app(arguments, SUPPORTED_TASKS, vllm_config.model_config)
    app.user_middleware = [
        middleware for middleware in app.user_middleware if not _is_unused(middleware)
    ]
    # FastAPI's own 404 and 405 are of the parent class, which vLLM's handler is not asked for.
    handler: Any = http_exception_handler
    app.add_exception_handler(HTTPException, handler)
    # `build_app` has built the stack already; cleared, it is built again from the above.
    app.middleware_stack = None
    await init_app_state(client, app.state, arguments, SUPPORTED_TASKS)
    app.state.openai_serving_completion = BoundedCompletions(
        app.state.openai_serving_completion, max_sequences
    )
    app.state.openai_serving_chat_batch = BoundedChatBatches(
        app.state.openai_serving_chat_batch, max_sequences
    )
    return app


def _is_unused(middleware: Middleware) -> bool:
    factory: object = middleware.cls
    return factory in _UNUSED_MIDDLEWARE
