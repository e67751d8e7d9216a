"""Who samples the first token: prefill, whose last step has its logits, or decode. Pure.

Prefill does where that cannot be told from the outside: where the tokens after the first depend
on it only through the model. It then counts as prompt on decode, so whatever looks back at
output tokens (penalties, bad words, grammars), draws from a seeded generator or describes the
token to the client (log-probabilities) is decode's from the first token on.
"""

from collections.abc import Mapping

# Of vLLM's sampling parameters; any other, those of later versions included, is decode's.
_LOOKS_NOT_BACK = frozenset(
    {
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_tokens",
        "min_tokens",
        "ignore_eos",
        "stop",
        "stop_token_ids",
        "_eos_token_id",
        "_all_stop_token_ids",
        "logit_bias",
        "allowed_token_ids",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "detokenize",
        "output_kind",
        "output_text_buffer_length",
        "stream_interval",
        "skip_clone",
    }
)


def may_prefill_sample(sampling: Mapping[str, object]) -> bool:
    """Return whether a prefill worker may sample a request's first token.

    `sampling` holds only what differs from its default, or is switched off (`watermarking`, by
    vLLM's front-end) or empty. 0 is neither: it is a seed, and a number of log-probabilities.
    """
    named = {name for name, value in sampling.items() if value is not False and value != []}
    return named <= _LOOKS_NOT_BACK
