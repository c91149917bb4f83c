"""Japanese: the key/value cache, and how a model's file was read."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    "cache/token": "キャッシュ/トークン",
    "{path} is a checkpoint quantized with {method}: its weights are read as the values they stand for, and shown as F32. "
    "What that quantization cost shows in a study of it beside the original F16 or BF16 weights (`--ref`).": (
        "{path}は{method}で量子化済みのチェックポイントである。重みはそれが表す値として読み込まれ、F32と表示される。"
        "その量子化による損失は、元のF16またはBF16の重みと並べた調査（`--ref`）で分かる。"
    ),
    "A key/value cache of type {kv}, {bytes} a token, costs {kl} nats with the weights of {original} as they are.": (
        "{kv}型のKVキャッシュ（1トークンあたり{bytes}）は、{original}の重みをそのまま使うとき{kl} natsの損失を生む。"
    ),
    "In {variant}, {both} nats, the cache does most of the damage: {cache} alone, {times} the {weights} of the weights alone.": (
        "{variant}（{both} nats）では損傷の大部分がキャッシュによる。キャッシュ単独で{cache}であり、重み単独の{weights}の{times}である。"
    ),
    "In {variant}, {both} nats, the weights do most of the damage: {weights} alone, against {cache} of the cache alone.": (
        "{variant}（{both} nats）では損傷の大部分が重みによる。重み単独で{weights}、キャッシュ単独で{cache}である。"
    ),
    "In {variant}, {both} nats, weights and cache cost about the same: {weights} and {cache} alone.": (
        "{variant}（{both} nats）では重みとキャッシュの損失がほぼ等しい。単独ではそれぞれ{weights}と{cache}である。"
    ),
    "All variants were run by the same reference with exact arithmetic, so what differs comes from the weights, and in the "
    "variants with kv= in their names from keys and values as a cache of that type gives them back. An engine that gives "
    "something else for one of these files, the same cache and the same token ids differs for another reason: its own "
    "arithmetic, its code, or other ids.": (
        "全バリアントを同じ参照実装が厳密計算で実行した。したがって差は重みに由来し、"
        "名前にkv=を含むバリアントでは、その型のキャッシュから読み出されるキーとバリューにも由来する。"
        "これらのファイル、同じキャッシュ、同じトークンIDに対して別の結果を出すエンジンは、"
        "別の理由（エンジン独自の演算、コード、または異なるID）で異なっている。"
    ),
}
