"""Japanese: key/value cache, and how a model's file was read."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    "{path} is a checkpoint quantized with {method}: its weights are read as the values they stand for, and shown as F32. "
    "What that quantization cost shows in a study of it beside the original F16 or BF16 weights (`--ref`).": (
        "{path} は {method} で量子化済みのチェックポイントです。重みは、それが表す値として読み込まれ、F32 と表示されます。"
        "その量子化による損失は、元の F16 または BF16 の重みと並べた分析（`--ref`）で分かります。"
    ),
    "A key/value cache of type {kv}, {bytes} a token, costs {kl} nats with the weights of {original} as they are.": (
        "{kv} 型の KV キャッシュ（1 トークンあたり {bytes}）は、{original} の重みをそのまま使った場合に {kl} nats の損失を生みます。"
    ),
    "In {variant}, {both} nats, the cache does most of the damage: {cache} alone, {times} the {weights} of the weights alone.": (
        "{variant}（{both} nats）では、損傷の大部分はキャッシュによるものです。"
        "キャッシュ単独で {cache}、重み単独の {weights} の {times} です。"
    ),
    "In {variant}, {both} nats, the weights do most of the damage: {weights} alone, against {cache} of the cache alone.": (
        "{variant}（{both} nats）では、損傷の大部分は重みによるものです。重み単独で {weights}、キャッシュ単独で {cache} です。"
    ),
    "In {variant}, {both} nats, weights and cache cost about the same: {weights} and {cache} alone.": (
        "{variant}（{both} nats）では、重みとキャッシュの損失はほぼ同じです。単独ではそれぞれ {weights} と {cache} です。"
    ),
    "All variants were run by the same reference with exact arithmetic, so what differs comes from the weights, and in the "
    "variants with kv= in their names from keys and values as a cache of that type gives them back. An engine that gives "
    "something else for one of these files, the same cache and the same token ids differs for another reason: its own "
    "arithmetic, its code, or other ids.": (
        "すべての変種は同じ参照実装により厳密な演算で実行されました。したがって差は重みに由来し、"
        "名前に kv= を含む変種では、その型のキャッシュから読み出されるキーと値にも由来します。"
        "これらのファイル、同じキャッシュ、同じトークン ID に対して異なる結果を出すエンジンは、"
        "別の理由（独自の演算、コード、または異なる ID）で異なります。"
    ),
}
