"""The smallest application of two pools: decode asks prefill, and both count tokens."""

from typing import Any

from ray import serve

from autoscaler.serve_meter import TokenMeter


class Prefill(TokenMeter):
    async def __call__(self, prompt_tokens: int) -> int:
        self.count_tokens(computed_prompt=prompt_tokens)
        return prompt_tokens


class Decode(TokenMeter):
    def __init__(self, prefill: Any) -> None:
        self._prefill = prefill

    async def __call__(self, prompt_tokens: int, output_tokens: int) -> int:
        await self._prefill.remote(prompt_tokens)
        self.count_tokens(generated=output_tokens)
        return output_tokens


deployment = serve.deployment(ray_actor_options={"num_cpus": 0})
app = deployment(Decode).bind(deployment(Prefill).bind())
