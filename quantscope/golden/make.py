"""A model → its pack."""

from __future__ import annotations

from collections.abc import Sequence

from quantscope import __version__
from quantscope.compare import EXACT_FLOOR, PREDICTED_TIMES
from quantscope.engines import model_name
from quantscope.errors import QuantscopeError
from quantscope.golden.pack import Pack, build_pack
from quantscope.golden.probes import make_probes
from quantscope.golden.record import record
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.results import DEFAULT_PROMPT
from quantscope.sources.base import Source
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import Tokenizer, check_ids, from_source
from quantscope.trace import Origin
from quantscope.weights import Weights

MAX_BYTES = 64_000_000

EXACT_TOLERANCE = (
    f"Here {EXACT_FLOOR:g} for every tap: what another order of float32 sums does. An engine that rounds activations needs a pack made "
    f"with `--arithmetic ggml`."
)
GGML_TOLERANCE = (
    f"Here {PREDICTED_TIMES:g} times the NMSE of ggml's CPU arithmetic (activations rounded to blocks of 8 bits, F16 key/value cache), "
    f"emulated for these ids, plus {EXACT_FLOOR:g}; an engine that computes in float32 on dequantized weights stays far below it."
)


def make_pack(
    model: str, *, prompt: str | None = None, tokens: Sequence[int] | None = None, ggml: bool = True, max_bytes: int = MAX_BYTES
) -> Pack:
    """The golden pack of a GGUF file or Hugging Face folder.

    prompt: the text of the probes, or its token ids.  ggml: take the tolerances from the emulated arithmetic of ggml, not of float32 alone.
    Raises PromptError for fewer than three tokens, ids that are no token's and texts longer than the context, UsageError when nothing
    useful fits into ``max_bytes``, and what opening the model raises.
    """
    source = open_source(model)
    weights = Weights(source)
    tokenizer = from_source(source) if tokens is None else _tokenizer_or_none(source)
    if tokens is None:
        assert tokenizer is not None
        tokens = tokenizer.encode(DEFAULT_PROMPT if prompt is None else prompt)
    probes = make_probes(check_ids(tokens, weights.config.n_vocab, weights.config.n_ctx))
    notes = () if tokenizer is None else tokenizer.notes
    origin = Origin("reference", __version__, "exact float32", model_name(model), source.sha256(), weights.config.arch, notes=notes)
    recorded = record(probes, weights, ggml_arithmetic(kv="F16") if ggml else None)
    return build_pack(weights, recorded, tokenizer, origin, GGML_TOLERANCE if ggml else EXACT_TOLERANCE, max_bytes)


def _tokenizer_or_none(source: Source) -> Tokenizer | None:
    """Ids were given: without a vocabulary that can be used the pack has no texts for the tokenizer, and says so."""
    try:
        tokenizer = from_source(source)
        tokenizer.encode("a")  # an unknown kind shows here
        return tokenizer
    except QuantscopeError:
        return None
