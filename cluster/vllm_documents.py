"""vLLM's sampling parameters, log-probabilities and counts as what the wire carries.

A document holds only what `cluster.wire` accepts. The router writes sampling documents after
vLLM's input processor has filled the derived fields (EOS, stop ids, bad-word ids, the chosen
grammar backend), so a worker needs neither tokenizer nor generation config to read one.
"""

import json
from collections.abc import Mapping
from typing import Any, cast

import msgspec
import numpy as np
import torch
from vllm.exceptions import VLLMError
from vllm.sampling_params import SamplingParams
from vllm.v1.metrics.stats import PrefillStats as VllmPrefillStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from cluster.errors import RequestInvalid
from cluster.messages import PrefillStats

_GRAMMAR = "structured_outputs"
# msgspec leaves out a number that is the default object itself, not one that equals it.
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(SamplingParams)}


def sampling_document(sampling: SamplingParams) -> dict[str, object]:
    """Return `sampling` as a document without the fields that have their default."""
    fields = cast(dict[str, object], msgspec.to_builtins(sampling, str_keys=True))
    document = {name: value for name, value in fields.items() if value != _DEFAULTS[name]}
    if document.get(_GRAMMAR) is not None:
        # A JSON schema may nest deeper than the wire lets a document nest; text may not.
        document[_GRAMMAR] = json.dumps(document[_GRAMMAR])
    return document


def sampling_from_document(document: Mapping[str, object]) -> SamplingParams:
    """Return the parameters in `document`; raise `RequestInvalid` if it holds none."""
    fields = dict(document)
    try:
        if isinstance(grammar := fields.get(_GRAMMAR), str):
            fields[_GRAMMAR] = json.loads(grammar)
        return msgspec.convert(fields, SamplingParams, str_keys=True)
    except (msgspec.ValidationError, VLLMError, ValueError, TypeError, RecursionError) as error:
        raise RequestInvalid(f"not a sampling document: {error}") from None


def logprobs_document(logprobs: LogprobsLists) -> dict[str, object]:
    """Return one request's slice of sampled-token log-probabilities as a document."""
    return {
        "token_ids": logprobs.logprob_token_ids.tolist(),
        "logprobs": logprobs.logprobs.tolist(),
        "ranks": logprobs.sampled_token_ranks.tolist(),
    }


def logprobs_from_document(document: Mapping[str, Any]) -> LogprobsLists:
    """Return the log-probabilities `logprobs_document` wrote."""
    return LogprobsLists(
        np.asarray(document["token_ids"], dtype=np.int32),
        np.asarray(document["logprobs"], dtype=np.float32),
        np.asarray(document["ranks"], dtype=np.int32),
    )


def prompt_logprobs_document(logprobs: LogprobsTensors) -> dict[str, object]:
    """Return one request's prompt log-probabilities as a document."""
    return {
        "token_ids": logprobs.logprob_token_ids.tolist(),
        "logprobs": logprobs.logprobs.tolist(),
        "ranks": logprobs.selected_token_ranks.tolist(),
    }


def prompt_logprobs_from_document(document: Mapping[str, Any]) -> LogprobsTensors:
    """Return the prompt log-probabilities `prompt_logprobs_document` wrote."""
    return LogprobsTensors(
        torch.tensor(document["token_ids"], dtype=torch.int32),
        torch.tensor(document["logprobs"], dtype=torch.float32),
        torch.tensor(document["ranks"], dtype=torch.int32),
    )


def prefill_stats(stats: VllmPrefillStats | None, is_continued: bool) -> PrefillStats | None:
    """Return the counts of the prompt alone.

    The last of what vLLM takes for one is never cached nor transferred.
    """
    if stats is None:
        return None
    return PrefillStats(
        num_prompt_tokens=stats.num_prompt_tokens - is_continued,
        num_computed_tokens=stats.num_computed_tokens - is_continued,
        num_local_cached_tokens=stats.num_local_cached_tokens,
        num_transferred_tokens=stats.num_external_cached_tokens,
    )
