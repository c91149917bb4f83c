"""Comparisons of traces, operations and settings of RoPE, in Japanese."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    # tables
    "tap": "タップ",
    "NMSE": "NMSE",
    "floor": "ノイズフロア",
    "cosine": "コサイン類似度",
    "worst at": "最大差の位置",
    "reference": "参照",
    "test": "対象",
    "engine": "エンジン",
    "engine, predicted": "エンジン、予測",
    "engine / predicted": "エンジン/予測",
    "all values": "全値",
    "fingerprint": "フィンガープリント",
    "sample {n} of {total}": "サンプル {n}/{total}",
    "statistics": "統計量",
    "{n} taps are not shown; `--all` shows them.": "{n}タップは省略。`--all`で表示する。",
    "NMSE of each effect. Quantization: original → this file, both exact. Engine: this file, exact → the engine on it.": (
        "各要因のNMSE。量子化：元モデル→このファイル、いずれも厳密計算。エンジン：このファイルの厳密計算→そのエンジン。"
    ),
    "{n} taps are only in the reference: {taps}.": "参照だけにあるタップは{n}個：{taps}。",
    "{n} taps are only in the test: {taps}.": "対象だけにあるタップは{n}個：{taps}。",
    # notes
    "an NMSE of {floor} at every tap, as asked for": "指定により全タップでNMSE {floor}",
    "an NMSE of {floor}, the order of float32 sums": "NMSE {floor}（float32の和を取る順序による差）",
    "an NMSE of {floor}, a wide allowance for engines that round activations; a reference of `quantscope trace MODEL` says what this file needs": (
        "NMSE {floor}（活性値を丸めるエンジンのための広めの許容値）。このファイルに必要な値は`quantscope trace MODEL`による参照でわかる"
    ),
    "an NMSE of {floor}, a wide allowance for engines that round activations; --predicted with `quantscope trace MODEL --arithmetic bf16` says what this file needs": (
        "NMSE {floor}（活性値を丸めるエンジンのための広めの許容値）。このファイルに必要な値は`quantscope trace MODEL --arithmetic bf16`と--predictedでわかる"
    ),
    "{times} times what {arithmetic} changes at the same tap": "同じタップで{arithmetic}が及ぼす変化の{times}倍",
    "ggml's arithmetic (8-bit activations, 16-bit cache)": "ggmlの演算（8ビットの活性値、16ビットのキャッシュ）",
    "position {position}": "位置{position}",
    "positions {first} to {last}": "位置{first}〜{last}",
    "shapes {shape} and {other}": "形状{shape}と{other}",
    "{n} values are not finite": "{n}個の値が有限でない",
    "printed to {n} decimals": "小数点以下{n}桁で出力",
    "{n} and {other} values": "値の数{n}と{other}",
    "{statistic} {value} and {other}": "{statistic} {value}と{other}",
    "channels were half-split (Hugging Face order), reordered": "チャネルが前後半の並び（Hugging Faceの順序）だったため並べ替えた",
    "{n} of {total} taps are compared by fingerprints: the error of a tap is known to about ±35 %; no class of fault is hidden from them, and they do not say which element is wrong.": (
        "{total}タップ中{n}タップはフィンガープリントで比較した：タップの誤差は約±35 %の精度でわかる。見逃される種類の誤りはないが、どの要素が誤っているかはわからない。"
    ),
    "{n} of {total} taps are compared by samples: only the values that were printed are compared; a difference elsewhere in the tensor is not seen, and an agreement says little about the rest.": (
        "{total}タップ中{n}タップはサンプルで比較した：出力された値だけを比較している。テンソルの他の部分の相違は見えず、一致していても残りについてはほとんど何もいえない。"
    ),
    "{n} of {total} taps are compared by statistics: an RMS or mean that differs proves a difference; one that agrees proves nothing, since a transposed weight or a permuted channel keeps both. Record fingerprints or values to know.": (
        "{total}タップ中{n}タップは統計量で比較した：RMSや平均が異なれば相違の証明になるが、一致していても何の証明にもならない。転置された重みや並べ替えられたチャネルでは両方とも変わらないからである。確かめるにはフィンガープリントか値を記録する。"
    ),
    "{trace} does not say its token ids: that both saw the same tokens is taken on trust.": "{trace}にはトークンIDがない。どちらも同じトークンを入力したものとみなす。",
    "{trace} does not say the hash of its file: that both ran the same file is taken on trust.": "{trace}にはファイルのハッシュがない。どちらも同じファイルを実行したものとみなす。",
    # the first divergence
    "{n} more taps": "ほか{n}タップ",
    "about {error}": "約{error}",
    "at least {error}": "{error}以上",
    "The first tap that differs is {tap} (NMSE {error}, floor {floor}).": "最初に相違するタップは{tap}である（NMSE {error}、ノイズフロア{floor}）。",
    "Its input {inputs} agrees, so the fault is in what makes it: {operation}.": "その入力{inputs}は一致しているため、誤りはそれを作る演算にある：{operation}。",
    "Nothing comes before it: it is {operation}.": "それより前には何もない：{operation}である。",
    "The last tap shown to agree is {before}; the fault is between the two, {tap} being made by {operation}.": (
        "一致が確認できる最後のタップは{before}である。誤りは両者の間にあり、{tap}を作るのは{operation}である。"
    ),
    "No tap before it is shown to agree; it is made by {operation}. Record more taps before it to see where it begins.": (
        "それより前に一致が確認できるタップはない。これを作るのは{operation}である。どこから始まるかを知るには、それより前のタップをさらに記録する。"
    ),
    "{taps} of {total} {_differ} in all.": "全{total}タップ中、相違があるのは{taps}である。",
    "No divergence: all {n} taps with values agree within their floor. Closest to it is {tap}, NMSE {error} of {floor}.": (
        "相違なし：値のある{n}タップすべてがノイズフロア内で一致する。最も近いのは{tap}で、ノイズフロア{floor}に対しNMSE {error}である。"
    ),
    "Nothing is shown to differ, and nothing is shown to agree: {taps} {_have} only statistics, which a permuted or transposed signal keeps.": (
        "相違も一致も確認できない：{taps}には統計量しかなく、並べ替えや転置では統計量は変わらない。"
    ),
    "{taps} cannot be judged from statistics.": "{taps}は統計量からは判定できない。",
    "The rotation could not be examined: {error}": "回転を調べられなかった：{error}",
    # operations
    "an operation this program does not know": "未知の演算",
    "the rows of token_embd.weight for the token ids": "トークンIDに対応するtoken_embd.weightの行",
    "the norm with attn_norm.weight": "attn_norm.weightによる正規化",
    "the product with attn_q.weight": "attn_q.weightとの積",
    "the product with attn_k.weight": "attn_k.weightとの積",
    "the product with attn_v.weight": "attn_v.weightとの積",
    "the norm of q with attn_q_norm.weight": "attn_q_norm.weightによるqの正規化",
    "the norm of k with attn_k_norm.weight": "attn_k_norm.weightによるkの正規化",
    "RoPE": "RoPE",
    "RoPE: {verdict}": "RoPE：{verdict}",
    "the norm with attn_norm_2.weight": "attn_norm_2.weightによる正規化",
    "RoPE and the product of q with attn_k_b.weight": "RoPE、およびqとattn_k_b.weightの積",
    "the product with attn_kv_a_mqa.weight, its norm and RoPE": "attn_kv_a_mqa.weightとの積、その正規化、およびRoPE",
    "the product that makes q, or two with a norm between them (attn_q_a.weight, attn_q_b.weight)": (
        "qを作る積、または間に正規化をはさむ2つの積（attn_q_a.weight、attn_q_b.weight）"
    ),
    "the latent vector (attn_kv_a_mqa.weight, its norm and RoPE) and the keys made of it": (
        "潜在ベクトル（attn_kv_a_mqa.weight、その正規化、およびRoPE）と、それから作られるキー"
    ),
    "the latent vector (attn_kv_a_mqa.weight and its norm) and the values made of it": (
        "潜在ベクトル（attn_kv_a_mqa.weightとその正規化）と、それから作られるバリュー"
    ),
    "the probabilities times v; with a matrix of each head times the latent vectors, and the product with attn_v_b.weight": (
        "確率とvの積。ヘッドごとの行列がある場合は潜在ベクトルとの積、およびattn_v_b.weightとの積"
    ),
    "the product with attn_qkv.weight": "attn_qkv.weightとの積",
    "the norm of what the attention adds": "アテンションが加えるものの正規化",
    "the product with ffn_gate_inp.weight": "ffn_gate_inp.weightとの積",
    "the router's softmax or sigmoid": "ルーターのsoftmaxまたはsigmoid",
    "the choice of experts": "エキスパートの選択",
    "the weights of the chosen experts": "選ばれたエキスパートの重み",
    "the products with ffn_gate_exps.weight": "ffn_gate_exps.weightとの積",
    "the products with ffn_up_exps.weight": "ffn_up_exps.weightとの積",
    "the experts' activation": "エキスパートの活性化関数",
    "the products with ffn_down_exps.weight": "ffn_down_exps.weightとの積",
    "the weighted sum of the experts": "エキスパートの重み付き和",
    "the product with ffn_down_shexp.weight": "ffn_down_shexp.weightとの積",
    "the shared experts times their gate": "共有エキスパートとそのゲートの積",
    "the norm of what the feed-forward adds": "フィードフォワードが加えるものの正規化",
    "the scaled, masked softmax of q·kᵀ": "スケールとマスクを適用したq·kᵀのsoftmax",
    "the probabilities times v, and how heads of v are shared": "確率とvの積、およびvのヘッドの共有方法",
    "the product with attn_output.weight": "attn_output.weightとの積",
    "the residual sum after the attention": "注意機構の後の残差和",
    "the norm with ffn_norm.weight": "ffn_norm.weightによる正規化",
    "the product with ffn_gate.weight": "ffn_gate.weightとの積",
    "the product with ffn_up.weight": "ffn_up.weightとの積",
    "the activation, times up where there is a gate": "活性化関数（ゲートがあればupとの積）",
    "the product with ffn_down.weight": "ffn_down.weightとの積",
    "the residual sum after the feed-forward": "フィードフォワードの後の残差和",
    "the norm with output_norm.weight": "output_norm.weightによる正規化",
    "the product with output.weight (token_embd.weight where tied)": "output.weight（共有の場合はtoken_embd.weight）との積",
    # RoPE
    "q (or k) is zero before or after the rotation: nothing can be said about it.": "回転の前または後のq（またはk）が0であり、何もいえない。",
    "The engine rotated with {setting}: NMSE {error} with it, {expected} with the expected setting.": "エンジンの回転の設定：{setting}。この設定でのNMSEは{error}、期待される設定では{expected}である。",
    "The engine rotated as expected (theta {theta}, {layout} pairs): NMSE {error}.": "エンジンは期待どおりに回転した（theta {theta}、{layout}の組）：NMSE {error}。",
    "These positions do not tell it from {settings}.": "これらの位置では次の設定と区別できない：{settings}。",
    "As good: {settings}.": "同程度に合う設定：{settings}。",
    "{settings} or {n} more": "{settings}、ほか{n}件",
    "Nothing can be said about the rotation: position 0 turns nothing, and nothing was turned. Record more positions.": (
        "回転については何もいえない：位置0では何も回転せず、実際に何も回転していない。より多くの位置を記録する。"
    ),
    "No setting of RoPE explains what the engine made of q (or k): the closest is {setting}, which leaves NMSE {left} ({expected} with the expected setting).": (
        "エンジンがq（またはk）に施した変換を説明するRoPEの設定はない：最も近いのは{setting}だが、NMSE {left}が残る（期待される設定では{expected}）。"
    ),
    "No setting of RoPE explains what the engine made of q (or k): the closest leaves NMSE {left} ({expected} with the expected setting).": (
        "エンジンがq（またはk）に施した変換を説明するRoPEの設定はない：最も近い設定でもNMSE {left}が残る（期待される設定では{expected}）。"
    ),
    "Either its frequencies follow no known rule, or it recorded something else than what it rotated.": "周波数が既知の規則に従わないか、回転したものとは別のものを記録している。",
    "The heads do not turn alike: it recorded something else than what it rotated, or does more than rotate.": "ヘッドごとに回転が異なる：回転したものとは別のものを記録したか、回転以外のこともしている。",
    "All heads do turn alike in {layout} pairs: the frequencies follow another rule.": "すべてのヘッドが{layout}の組で同じように回転する：周波数が別の規則に従っている。",
    "All heads do turn alike in {layout} pairs, but by other frequencies [rad per position]: {pairs}.": "すべてのヘッドが{layout}の組で同じように回転するが、周波数 [rad/位置] が異なる：{pairs}。",
    "pair {i} by {rate} (setting: {expected})": "組{i}は{rate}（設定値{expected}）",
    "Its channels lie in another order than the reference's: halves are pairs here, neighbours there, as in a Hugging Face checkpoint and its GGUF file.": (
        "チャネルの並びが参照と異なる：こちらでは前半と後半、参照では隣どうしが組になっており、Hugging Faceのチェックポイントとそれから作ったGGUFの関係と同じである。"
    ),
    "Its channels lie in another order than the reference's: neighbours are pairs here, halves there, as in a Hugging Face checkpoint and its GGUF file.": (
        "チャネルの並びが参照と異なる：こちらでは隣どうし、参照では前半と後半が組になっており、Hugging Faceのチェックポイントとそれから作ったGGUFの関係と同じである。"
    ),
    "That by itself changes no attention score.": "それだけでは注意スコアは変わらない。",
    "the expected setting": "期待される設定",
    "halves (i, i + dim/2)": "前後半（i, i + dim/2）",
    "neighbours (2i, 2i + 1)": "隣どうし（2i, 2i + 1）",
    "pairs of {found} instead of {expected}": "{expected}ではなく{found}の組",
    "{found} channels of a head turning instead of {expected} (and {found} in the exponent)": "ヘッドの{expected}チャネルではなく{found}チャネルが回転（指数部も{found}）",
    "{found} channels of a head turning instead of {expected} (with {expected} in the exponent)": "ヘッドの{expected}チャネルではなく{found}チャネルが回転（指数部は{expected}）",
    "{found} channels in the exponent of theta instead of {expected}": "thetaの指数部のチャネル数が{expected}ではなく{found}",
    "theta {found} instead of {expected}": "thetaが{expected}ではなく{found}",
    "magnitude {found} instead of {expected}": "大きさが{expected}ではなく{found}",
    "no {name} scaling (by {factor})": "{name}スケーリング（{factor}倍）なし",
    "no {name} scaling (by {factor}) of the frequencies": "周波数の{name}スケーリング（{factor}倍）なし",
    "linear scaling by {factor} of every pair instead of YaRN's": "YaRNではなく全組の{factor}倍の線形スケーリング",
    "linear scaling by {factor} of every pair instead of YaRN's ramp": "YaRNの傾斜ではなく全組の{factor}倍の線形スケーリング",
    "linear scaling by {factor} applied twice": "{factor}倍の線形スケーリングを2回適用",
    "the frequency factors (rope_freqs.weight) ignored": "周波数係数（rope_freqs.weight）を無視",
    "the frequency factors (rope_freqs.weight) applied twice": "周波数係数（rope_freqs.weight）を2回適用",
    "frequencies multiplied by their factors (rope_freqs.weight), not divided": "周波数を係数（rope_freqs.weight）で割らずに掛ける",
    "{name}'s frequency factors, which this model has not": "このモデルにはない{name}の周波数係数",
    "no rotation at all": "回転なし",
    "positions 1 too high (counted from 1?)": "位置が1だけ大きい（1から数えている？）",
    "positions 1 too low": "位置が1だけ小さい",
    "positions {n} too high": "位置が{n}だけ大きい",
    "positions {n} too low": "位置が{n}だけ小さい",
    "the reverse rotation (the sign of sin)": "逆回転（sinの符号）",
    "the rotation applied twice": "回転を2回適用",
    "positions divided by {factor} (linear scaling)": "位置を{factor}で割る（線形スケーリング）",
    "position {position} for every token": "全トークンが位置{position}",
    "positions times {scale}": "位置を{scale}倍",
    "positions times {scale} (linear scaling by {factor})": "位置を{scale}倍（{factor}倍の線形スケーリング）",
}
