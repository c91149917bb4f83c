"""What is in a model file, in Japanese."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    "{path}: {kind}, {size}, {tensors}, {n} weights, {bpw} bits per weight": "{path}：{kind}、{size}、{tensors}、重み{n}個、重みあたり{bpw}ビット",
    "Hugging Face folder": "Hugging Faceのフォルダ",
    "The file ends too early: {n} of {tensors} are incomplete or missing ({names}).": "ファイルが途中で終わっている：{tensors}のうち{n}個が不完全または欠落（{names}）。",
    "Types": "型",
    "Tensors": "テンソル",
    "Metadata": "メタデータ",
    "type": "型",
    "tensors": "テンソル数",
    "weights": "重みの数",
    "bytes": "バイト",
    "of all": "全体比",
    "bits per weight": "ビット/重み",
    "number": "個数",
    " (incomplete)": "（不完全）",
    "key": "キー",
    "value": "値",
}
