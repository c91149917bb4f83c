"""Imported logs, dumps and tables, and the notes in traces, in Japanese."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    "SwiGLU RMS": "SwiGLU RMS",
    "SwiGLU mean": "SwiGLU平均",
    "the document of --json": "--jsonの出力",
    "{name}: {facts}": "{name}：{facts}",
    "{kind}, {where}: {taps}": "{kind}、{where}：{taps}",
    "{tokens} [{ids}]": "{tokens} [{ids}]",
    "token ids not known": "トークンID不明",
    "statistics ({names})": "統計量（{names}）",
    "samples": "サンプル",
    "fingerprints": "フィンガープリント",
    "{n} positions from {first} to {last}": "{first}〜{last}の{n}位置",
    "{taps} in {_layers} {layers}": "{taps}（層{layers}）",
    "Which run each number is from": "各数値の出所の実行",
    "from": "出所",
    "{numbers}: {runs}": "{numbers}：{runs}",
    "none of these runs": "これらの実行のいずれでもない",
    "input RMS": "入力RMS",
    "output RMS": "出力RMS",
    "output mean": "出力の平均",
    # notes that traces keep
    "Decoded token by token over the key/value cache.": "キー・バリューキャッシュを使って1トークンずつデコードした。",
    "This CPU has AMX tiles: llama.cpp ran without them and without interleaved weights, in its plain CPU code.": (
        "このCPUにはAMXタイルがあるが、llama.cppはそれを使わず、重みのインターリーブもせず、通常のCPUコードで実行した。"
    ),
    "Transformers has no module that shows {taps} of this model: these taps are left out.": (
        "このモデルの{taps}を出力するモジュールがTransformersにないため、これらのタップは除いた。"
    ),
    "What Transformers rounds in bfloat16 is emulated to the bit for {known}, not for {arch}: a floor predicted for it is an estimate. Compare in float32 to be sure.": (
        "Transformersのbfloat16の丸めを1ビットまで再現できるのは{known}で、{arch}ではそうでない。予測した下限は目安である。確かめるにはfloat32で比較する。"
    ),
    "Observing every operation changed no bit of the logits.": "全演算を観測してもlogitは1ビットも変わらなかった。",
    "Observing the operations changed the logits by an NMSE of {error}: llama.cpp fuses some of them otherwise.": (
        "演算を観測するとlogitがNMSE {error}だけ変わった：観測しない場合、llama.cppは一部の演算を融合する。"
    ),
    "Whether the channels of a head of q and k stand as in GGUF (interleaved) or in two halves (Hugging Face) is not visible in arrays: they are taken as they are.": (
        "qとkのヘッドのチャネルがGGUFの並び（交互）か前後半の並び（Hugging Face）かは配列からはわからない。そのまま読み込んだ。"
    ),
    "Layouts found: {layouts} of {n} arrays.": "{n}個の配列の配置：{layouts}。",
    "Arrays that are no taps, left out: {names}.": "タップではないため除いた配列：{names}。",
    "flat index": "平坦な添字",
    "printed value": "出力された値の番号",
    "channel": "チャネル",
    "{tap}: {n} of {total} values are NaN or infinite, the first at {place} {at} ({value}).": "{tap}：{total}個中{n}個の値がNaNまたは無限大であり、最初は{place}{at}（{value}）である。",
    "{tap}: {names} is NaN.": "{tap}：{names}がNaNである。",
    "Row {layer} mixes two runs: {parts}. Compare no numbers across it.": "行{layer}には2つの実行が混ざっている：{parts}。この行の数値どうしを比較してはならない。",
    "Row {layer} mixes {n} runs: {parts}. Compare no numbers across it.": "行{layer}には{n}個の実行が混ざっている：{parts}。この行の数値どうしを比較してはならない。",
    "The {statistic} of layer {layer}'s output is {output}, but {input} where it is layer {next}'s input: it is one signal, so two runs or builds are mixed, or a tap is not where it says.": (
        "層{layer}の出力の{statistic}は{output}だが、層{next}の入力としては{input}である。両者は同じ信号なので、2つの実行やビルドが混ざっているか、タップの位置が表示と異なる。"
    ),
    "Sums were added up by llama.cpp in float32, over all values.": "総和はllama.cppがfloat32で全値について計算したものである。",
    "Sums are left out: this build of llama.cpp added up the printed values only.": "総和は除いた：このビルドのllama.cppは出力した値だけを合計している。",
    "Left out, as the log does not say which positions they hold: {taps}.": "ログからどの位置のものかわからないため除いたタップ：{taps}。",
    "The log does not say which token ids were run: print `qsfp1-run tokens=1,2,3` first.": "ログに実行したトークンIDがない：先に`qsfp1-run tokens=1,2,3`を出力する。",
    "Selected token {token}: logit {logit}, rank {rank}.": "選択されたトークン{token}：logit {logit}、順位{rank}。",
    "Selected token {token}: logit {logit}.": "選択されたトークン{token}：logit {logit}。",
    "Selected token {token}, whose logit was not printed.": "選択されたトークン{token}（logitは出力されていない）。",
    "{n} printed embeddings are left out: the call's ids do not say at which position they stand.": "出力された埋め込みのうち{n}個は除いた：呼び出しのIDからはどの位置のものかわからない。",
    "The log does not say how many channels a tap has: the shapes of samples end with the last value printed.": (
        "ログにタップのチャネル数がない：サンプルの形状は最後に出力された値までとした。"
    ),
}
