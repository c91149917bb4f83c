"""The text files of a pack, each made from its manifest: pure functions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

from quantscope.fingerprint import fingerprint, run_line, to_line
from quantscope.golden.record import Recorded
from quantscope.trace import Origin
from quantscope.wording import count, listed

Manifest = Mapping[str, Any]


def manifest_text(manifest: Manifest) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=True) + "\n"


def index(manifest: Manifest) -> str:
    """``EXPECTED YOURS VALUES TOLERANCE`` of every float file, in the order in which to check."""
    lines = ["# expected yours values tolerance"]
    for facts in (*manifest["tensors"], *(tap for probe in manifest["probes"] for tap in probe["taps"])):
        if "file" in facts:
            lines.append(f"{facts['file']} {facts.get('yours', facts['file'])} {math.prod(facts['shape'])} {facts['tolerance']:.3g}")
    return "\n".join(lines) + "\n"


def probe_ids(manifest: Manifest) -> str:
    """``NAME: ids`` of every probe."""
    return "".join(f"{probe['name']}: {' '.join(map(str, probe['ids']))}\n" for probe in manifest["probes"])


def expected_ids(manifest: Manifest) -> str:
    """``NAME: ids`` of every text of the tokenizer."""
    return "".join(f"{' '.join([case['name'] + ':', *map(str, case['ids'])])}\n" for case in manifest["tokenizer"])


def top_text(probe: Manifest) -> str:
    """``id logit`` of the largest logits at the last position, largest first."""
    return "".join(f"{top['id']} {top['logit']:.9g}\n" for top in probe["top"])


def fingerprints(recorded: Sequence[Recorded], origin: Origin) -> str:
    """One run a probe, all taps over all positions; ``decode`` would repeat those of ``text``."""
    lines = []
    for r in recorded:
        if r.probe.name != "decode":
            lines.append(run_line(replace(origin, tokens=r.probe.ids)))
            lines += [to_line(name, fingerprint(x)) for name, x in r.taps.items()]
    return "\n".join(lines) + "\n"


def checker() -> str:
    """The source of the checker in C."""
    return _resource("check.c")


def readme(manifest: Manifest) -> str:
    """README.md of the pack."""
    repeated = next(probe for probe in manifest["probes"] if probe["name"] == "repeated")
    normed = any(tap["tap"].startswith("Qcur_normed") for tap in repeated["taps"])
    values = {
        "model": manifest["model"]["name"],
        "facts": _facts(manifest),
        "repeated": str(len(repeated["ids"])),
        "tolerance": manifest["tolerance"],
        "left_out": _left_out(manifest),
        "norms": "`Qcur_normed-i` and `Kcur_normed-i` lie between: q and k after their own norm, before RoPE.\n" if normed else "",
        "checker": checker(),
    }
    text = _resource("README.template.md")
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def _facts(manifest: Manifest) -> str:
    """The file and how the values were made, as list items."""
    model, values = manifest["model"], manifest["values"]
    filed = {tap["file"] for probe in manifest["probes"] for tap in probe["taps"] if "file" in tap}
    texts = f"{count(len(manifest['tokenizer']), 'text')} for the tokenizer"
    parts = (f"{count(len(filed), 'file')} of taps", f"the first rows of {count(len(manifest['tensors']), 'tensor')}", texts)
    items = [
        f"file: `{model['name']}`, architecture {model['arch']}, sha256 `{model['sha256']}`",
        f"values: {values['arithmetic']} on the dequantized weights of that file, by quantscope {manifest['quantscope_version']}",
        f"here: {listed(parts)}; {manifest['filed']}",
        *manifest["notes"],
    ]
    return "\n".join(f"- {item}" for item in items)


def _left_out(manifest: Manifest) -> str:
    """What has no file, in a list item; nothing where everything has one."""
    missing = sum("file" not in tap for probe in manifest["probes"] if probe["name"] != "decode" for tap in probe["taps"])
    cut = any(
        tap.get("positions", [0]) != list(range(len(probe["ids"])))
        for probe in manifest["probes"]
        for tap in probe["taps"]
        if "file" in tap
    )
    items = []
    if missing:
        items.append(f"{count(missing, 'tap')} have a fingerprint only")
    if cut:
        items.append("`result_output` holds the logits of the last position only")
    if not manifest["tokenizer"]:
        items.append("the file has no vocabulary, so there is no `tokenizer/`")
    return f"- To keep the pack small: {listed(items)}.\n" if items else ""


def _resource(name: str) -> str:
    return (resources.files("quantscope.golden") / name).read_text("utf-8")
