"""A pack of what was recorded: which values fit, the manifest that describes them, and the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantscope import __version__
from quantscope.errors import UsageError
from quantscope.golden import CHECKER, INDEX, KEY, MANIFEST, PRINTS, README, VERSION
from quantscope.golden.probes import tokenizer_cases
from quantscope.golden.record import ROWS_FLOOR, Recorded
from quantscope.golden.texts import checker, expected_ids, fingerprints, index, manifest_text, probe_ids, readme, top_text
from quantscope.metrics import rms
from quantscope.tokenizers import Tokenizer
from quantscope.trace import Origin
from quantscope.weights import Weights
from quantscope.wording import size

N_TOP = 20
WHOLE_LOGITS = 4096  # ids up to which the logits of all positions are filed; of a larger vocabulary those of the last position only
RESIDUAL = ("embd", "l_out", "result_norm", "result_output")


@dataclass(frozen=True)
class Level:
    """What is filed: taps of probes, and rows of tensors.  The first level that fits is taken."""

    says: str
    has: Callable[[str, str, int | None, int], bool]  # probe, tap without its layer, layer, number of layers
    rows: int


LEVELS = (
    Level("every tap of every probe", lambda probe, tap, i, n: True, 2),
    Level(
        "every tap of `one` and `two`, the residual stream of the other probes",
        lambda probe, tap, i, n: probe in ("one", "two") or tap in RESIDUAL,
        2,
    ),
    Level("the residual stream of every probe", lambda probe, tap, i, n: tap in RESIDUAL, 1),
    Level(
        "the residual stream after the first two layers, the middle one and the last",
        lambda probe, tap, i, n: tap in RESIDUAL and (i is None or i in (0, 1, n // 2, n - 1)),
        1,
    ),
)


@dataclass(frozen=True)
class Pack:
    """The files by name, and the manifest that describes them."""

    files: Mapping[str, bytes]
    manifest: Mapping[str, Any]

    @property
    def n_bytes(self) -> int:
        return sum(map(len, self.files.values()))


def build_pack(
    weights: Weights, recorded: Sequence[Recorded], tokenizer: Tokenizer | None, origin: Origin, tolerance: str, max_bytes: int
) -> Pack:
    """The pack of the recorded probes.

    origin: of the values, its tokens aside.  tolerance: the sentence on where the tolerances come from.
    Raises UsageError when even the smallest pack is over ``max_bytes``, counting the float files.
    """
    for level in LEVELS:
        floats: dict[str, Tensor] = {}
        tensors = [_tensor(weights, name, level.rows, floats) for name in weights.names()]
        probes = [_probe(r, level, weights.config.n_layer, tokenizer, floats) for r in recorded]
        needed = sum(4 * x.numel() for x in floats.values())
        if needed <= max_bytes:
            break
    else:
        raise UsageError(
            f"--max-bytes {max_bytes}: the smallest pack of this model needs {size(needed)} for {level.says} and one row of every tensor. "
            f"Give `--max-bytes {needed}`, or a shorter text with `--prompt`."
        )
    manifest = {
        KEY: VERSION,
        "quantscope_version": __version__,
        "model": {"name": origin.model, "sha256": origin.model_sha256, "arch": origin.arch},
        "values": {"arithmetic": origin.arithmetic, "dtype": "float32", "byte_order": "little", "order": "row-major"},
        "tolerance": tolerance,
        "filed": level.says,
        "notes": list(origin.notes),
        "tensors": tensors,
        "tokenizer": [] if tokenizer is None else _tokenizer(tokenizer),
        "probes": probes,
    }
    return Pack(_raw(floats) | _texts(manifest, recorded, origin), manifest)


def _tensor(weights: Weights, name: str, rows: int, floats: dict[str, Tensor]) -> dict[str, Any]:
    """The first rows of a tensor, [rows,in], or all of a vector."""
    shape = weights.shape(name)
    made = name not in weights.stored_names()
    values = weights.rows(name, torch.arange(min(rows, shape[0]))) if len(shape) == 2 else weights.get(name)
    file = f"tensors/{name}.f32"
    floats[file] = values
    return {
        "name": name,
        "type": "F32" if made else weights.stored(name).qtype.name,
        "shape_in_model": list(shape),
        "file": file,
        "shape": list(values.shape),
        "tolerance": ROWS_FLOOR,
    }


def _probe(r: Recorded, level: Level, n_layer: int, tokenizer: Tokenizer | None, floats: dict[str, Tensor]) -> dict[str, Any]:
    """Facts of a probe; its values go to ``floats``, but for those of ``decode``, which are the files of ``text``."""
    taps = []
    for name, x in r.taps.items():
        stem, _, layer = name.rpartition("-") if "-" in name else (name, "", "")
        last_only = name == "result_output" and x.shape[-1] > WHOLE_LOGITS
        facts = {"tap": name, "tolerance": r.tolerance[name], "rms": rms(x.flatten()).item()}
        if level.has(r.probe.name, stem, int(layer) if layer else None, n_layer):
            filed = x[-1:] if last_only else x
            file = f"{'text' if r.probe.name == 'decode' else r.probe.name}/{name}.f32"
            floats[file] = filed
            positions = [len(r.probe.ids) - 1] if last_only else list(range(len(r.probe.ids)))
            facts |= {"file": file, "yours": f"{r.probe.name}/{name}.f32", "shape": list(filed.shape), "positions": positions}
        taps.append(facts)
    top = r.taps["result_output"][-1].topk(min(N_TOP, r.taps["result_output"].shape[-1]))
    return {
        "name": r.probe.name,
        "adds": r.probe.adds,
        "ids": list(r.probe.ids),
        "pieces": None if tokenizer is None else [tokenizer.piece(i) for i in r.probe.ids],
        "top": [
            {"id": i, "logit": logit, "piece": None if tokenizer is None else tokenizer.piece(i)}
            for i, logit in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
        "taps": taps,
    }


def _tokenizer(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    return [
        {
            "name": case.name,
            "file": f"tokenizer/{case.name}.txt",
            "text": case.text,
            "parse_special": case.parse_special,
            "ids": tokenizer.encode(case.text, parse_special=case.parse_special),
        }
        for case in tokenizer_cases(tokenizer)
    ]


def _raw(floats: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Little-endian float32 in row-major order."""
    return {name: x.float().cpu().contiguous().numpy().astype("<f4").tobytes() for name, x in floats.items()}


def _texts(manifest: Mapping[str, Any], recorded: Sequence[Recorded], origin: Origin) -> dict[str, bytes]:
    """Every file that is no float file."""
    texts = {
        MANIFEST: manifest_text(manifest),
        INDEX: index(manifest),
        README: readme(manifest),
        PRINTS: fingerprints(recorded, origin),
        CHECKER: checker(),
        "probes.txt": probe_ids(manifest),
    }
    texts |= {f"{probe['name']}/top20.txt": top_text(probe) for probe in manifest["probes"] if probe["name"] != "decode"}
    if manifest["tokenizer"]:
        texts |= {case["file"]: case["text"] for case in manifest["tokenizer"]}
        texts["tokenizer/expected.txt"] = expected_ids(manifest)
    return {name: text.encode("utf-8", "surrogatepass") for name, text in texts.items()}
