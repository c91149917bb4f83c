"""How wide each tap is: the channels of a tap by the axes of ``quantscope.model``, and a trace held against a model's sizes."""

from __future__ import annotations

from dataclasses import replace

from quantscope.arch.config import ModelConfig
from quantscope.errors import ImportFormatError
from quantscope.model.taps import EMBD, HEAD_TAPS, LAYER_TAPS, place_of
from quantscope.model.wiring import CHANNELS, OF_CHOSEN, tap_width
from quantscope.trace import Evidence, Full, Sample, Trace

ATTENTION_MAP = "kq_soft_max"  # [H,P,S], the only tap without channels
WITH_CHANNELS = tuple(stem for stem in (EMBD, *LAYER_TAPS, *HEAD_TAPS) if stem != ATTENTION_MAP)
# tap → letter of ModelConfig.axis; a head's value is as long as its key in every file that an importer knows
AXIS = {
    stem: {"W": "K", "O": "Q"}.get(letter, letter)
    for stem in WITH_CHANNELS
    if stem not in OF_CHOSEN and (letter := CHANNELS.get(stem, "E"))
}
BY_HEAD = tuple(stem for stem, letter in AXIS.items() if letter in "QK")  # channels run over heads, then over a head's channels
ORDER_MATTERS = ("Qcur_pre", "Kcur_pre", "Qcur_normed", "Kcur_normed", "Qcur", "Kcur")  # Hugging Face keeps the two halves of a head apart


def check_widths(trace: Trace, config: ModelConfig) -> Trace:
    """The trace with the full width of every sample that was too short to show it.

    Raises ImportFormatError where a tap has more or fewer channels, or a later layer, than the model.
    """
    return replace(trace, taps={tap: tuple(_checked(tap, e, config) for e in pieces) for tap, pieces in trace.taps.items()})


def _checked(tap: str, evidence: Evidence, config: ModelConfig) -> Evidence:
    stem, layer = place_of(tap)
    if layer is not None and layer >= config.n_layer:
        raise ImportFormatError(f"{tap}: the model of `--model` has {config.n_layer} layers. Give the file that the engine ran.")
    if stem not in AXIS or not isinstance(evidence, Full | Sample):
        return evidence
    width = tap_width(config, tap)
    if isinstance(evidence, Sample) and evidence.shape[0] == 1 and evidence.shape[-1] < width:
        return replace(evidence, shape=(1, width))
    found = evidence.shape[-1] if isinstance(evidence, Sample) else evidence.values.shape[-1]
    if found != width:
        raise ImportFormatError(
            f"{tap}: {found:,} channels, but the model of `--model` has {width:,} there. The numbers come from another model: give the "
            f"file that the engine ran, or leave `--model` out."
        )
    return evidence
