"""Hypotheses and what to record next, in Japanese."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    "Hypotheses": "仮説",
    "hypothesis": "仮説",
    "status": "判定",
    "evidence → test": "証拠 → 検証方法",
    "supported": "支持",
    "refuted": "反証",
    "untested": "未検証",
    "The quantization is too coarse: the file itself, computed exactly, gives another output than the original.": "量子化が粗すぎる：ファイルを厳密に計算しても元モデルと異なる出力になる。",
    "The architecture makes the signal grow from layer to layer, whatever the quantization.": "量子化によらず、アーキテクチャが信号を層ごとに増幅する。",
    "The engine computes something else than the file says.": "エンジンがファイルと異なる計算をしている。",
    "The engine's tokenizer makes other ids of the prompt.": "エンジンのトークナイザがプロンプトから異なるIDを作る。",
    "The file is damaged or was converted wrongly.": "ファイルが壊れているか、変換が誤っている。",
    "Rounding activations, as this engine is expected to do, changes the token.": "このエンジンで想定される活性値の丸めがトークンを変える。",
    "Quantization error decides where the mean of the layer outputs drifts.": "量子化誤差が層の出力の平均のドリフト方向を決める。",
    # quantization
    "The original was not computed beside the quantized file.": "量子化ファイルと並べて元モデルを計算していない。",
    "Quantization alone raises KL from 0 to {kl} nats ({coarse} counts as coarse).": "量子化だけでKLは0から{kl} natsに増える（{coarse}以上を粗いとみなす）。",
    "Quantization alone raises KL from 0 to {kl} nats ({coarse} counts as coarse); with the engine it is {engine}.": (
        "量子化だけでKLは0から{kl} natsに増える（{coarse}以上を粗いとみなす）。エンジンを加えると{engine}になる。"
    ),
    "Quantization alone raises KL from 0 to {kl} nats ({coarse} counts as coarse); with the engine it is {engine}, which quantization does not explain.": (
        "量子化だけでKLは0から{kl} natsに増える（{coarse}以上を粗いとみなす）。エンジンを加えると{engine}になり、これは量子化では説明できない。"
    ),
    "Computed exactly, the quantized file keeps the original's token {original}.": "厳密に計算すると、量子化ファイルは元モデルのトークン{original}を保つ。",
    "Computed exactly, the quantized file keeps the original's token {original}; the engine gives {engine}.": (
        "厳密に計算すると、量子化ファイルは元モデルのトークン{original}を保つ。エンジンの出力は{engine}である。"
    ),
    "Computed exactly, the quantized file changes the original's token {original} to {quantized}.": "厳密に計算しても、量子化ファイルは元モデルのトークン{original}を{quantized}に変える。",
    "Computed exactly, the quantized file changes the original's token {original} to {quantized}; the engine gives {engine}.": (
        "厳密に計算しても、量子化ファイルは元モデルのトークン{original}を{quantized}に変える。エンジンの出力は{engine}である。"
    ),
    # architecture
    "{growth} in the original in float32": "float32の元モデルで{growth}",
    "{growth} in the quantized file computed exactly": "厳密に計算した量子化ファイルで{growth}",
    "{growth} in the engine": "エンジンで{growth}",
    "RMS was not measured.": "RMSは測定していない。",
    "RMS grows {growth}; nothing was measured beside it.": "RMSは{growth}になる。比較対象は測定していない。",
    "RMS grows {growth}, {others}: the same growth without quantization is the model's nature, no evidence of an error.": (
        "RMSは{growth}、{others}になる。量子化なしでも同じ成長を示すので、これはモデルの性質であり、誤りの証拠ではない。"
    ),
    "RMS grows {growth}, {others}: the same growth without the engine is the model's nature, no evidence of an error.": (
        "RMSは{growth}、{others}になる。エンジンなしでも同じ成長を示すので、これはモデルの性質であり、誤りの証拠ではない。"
    ),
    "RMS grows {growth}, {others}: {far} apart, so it is not the model alone.": "RMSは{growth}、{others}になる。差が{far}あるため、モデルの性質だけではない。",
    # engine
    "Not comparable: {why}.": "比較できない：{why}。",
    "it ran another file": "別のファイルを実行した",
    "nothing shows that both ran the same file": "どちらも同じファイルを実行したことを示すものがない",
    "it ran other token ids": "別のトークンIDを実行した",
    "nothing shows that both ran the same token ids": "どちらも同じトークンIDを実行したことを示すものがない",
    "neither taps nor logits of the engine were compared": "エンジンのタップもlogitも比較していない",
    "Recomputed from the engine's own inputs, {operations} wrong by themselves: {named}.": "エンジン自身の入力から再計算すると、それ自体が誤っているのは{operations}である：{named}。",
    "The first tap beyond its floor is {tap}: NMSE {error}, floor {floor}.": "最初にノイズフロアを超えるタップは{tap}である：NMSE {error}、ノイズフロア{floor}。",
    "From the exact execution of the same file the engine's expected arithmetic raises KL to {expected} nats, the engine measures {engine}: more than {times} times, unexplained, implementation.": (
        "同じファイルの厳密計算を基準とすると、エンジンの想定される演算でKLは{expected} natsに増えるが、エンジンの実測値は{engine}である。{times}倍を超えており説明がつかず、実装の問題である。"
    ),
    "From the original the engine's expected arithmetic raises KL to {expected} nats, the engine measures {engine}: more than {times} times, unexplained, implementation.": (
        "元モデルを基準とすると、エンジンの想定される演算でKLは{expected} natsに増えるが、エンジンの実測値は{engine}である。{times}倍を超えており説明がつかず、実装の問題である。"
    ),
    "local replay": "局所再計算",
    "KL {engine} nats with {expected} expected": "KL {engine} nats（想定は{expected}）",
    "Nothing found beyond expected arithmetic ({looked}); excluded: {excluded}; not testable with this evidence: {hidden}.": (
        "想定される演算を超えるものは見つからなかった（{looked}）。除外されたもの：{excluded}。この証拠では検証できないもの：{hidden}。"
    ),
    "what changes these values by more than rounding does": "これらの値を丸めより大きく変えるもの",
    "what other prompts, lengths or settings would show": "他のプロンプト、長さ、設定でだけ現れるもの",
    # tokenizer and file
    "The token ids differ.": "トークンIDが異なる。",
    "The token ids differ, first at position {position}: {expected} expected, {found} in the engine.": "トークンIDが異なる。最初は位置{position}で、期待値は{expected}、エンジンでは{found}である。",
    "The engine made the same token ids of the same text.": "エンジンは同じテキストから同じトークンIDを作った。",
    "The engine was given its token ids, so its own tokenizer was not used.": "エンジンにはトークンIDを与えたため、そのトークナイザは使われていない。",
    "The engine's token ids are not known.": "エンジンのトークンIDは不明である。",
    "no token": "トークンなし",
    "id {id}": "ID {id}",
    "Both ran the same file, which would damage both alike; its tensors were not compared with another file's.": (
        "どちらも同じファイルを実行しており、壊れていれば両方に同じ影響が出る。テンソルを他のファイルと比較していない。"
    ),
    "Its tensors were not compared with another file's.": "テンソルを他のファイルと比較していない。",
    "{tensors} differ from the original's beyond their types: {names}.": "{tensors}が型で説明できる以上に元モデルと異なる：{names}。",
    "No tensor differs from the original's beyond what its type explains.": "型で説明できる以上に元モデルと異なるテンソルはない。",
    # activation rounding
    "The engine's expected arithmetic was not emulated.": "エンジンの想定される演算をエミュレートしていない。",
    "The expected arithmetic keeps the exact token {exact}.": "想定される演算は厳密計算のトークン{exact}を保つ。",
    "The expected arithmetic keeps the exact token {exact}; it raises KL from 0 to {kl} nats.": "想定される演算は厳密計算のトークン{exact}を保つ。KLは0から{kl} natsに増える。",
    "The expected arithmetic changes the token from {exact} to {expected}; the engine's token is not known.": "想定される演算はトークンを{exact}から{expected}に変える。エンジンのトークンは不明である。",
    "The expected arithmetic changes the token from {exact} to {expected}, but the engine gives {engine}.": "想定される演算はトークンを{exact}から{expected}に変えるが、エンジンの出力は{engine}である。",
    "The expected arithmetic changes the token from {exact} to {expected} as in the engine; whether exact activations restore it was not tested.": (
        "想定される演算はエンジンと同じくトークンを{exact}から{expected}に変える。活性値を厳密な値にすると元に戻るかどうかは検証していない。"
    ),
    "The expected arithmetic changes the token from {exact} to {expected} as in the engine, but exact activations restore it at no tap.": (
        "想定される演算はエンジンと同じくトークンを{exact}から{expected}に変えるが、どのタップの活性値を厳密な値にしても元に戻らない。"
    ),
    "The expected arithmetic changes the token from {exact} to {expected} as in the engine; exact activations at {places} restore {exact}.": (
        "想定される演算はエンジンと同じくトークンを{exact}から{expected}に変える。{places}の活性値を厳密な値にすると{exact}に戻る。"
    ),
    "Channel {index} of {tap} makes {share} of the rounding error there.": "{tap}のチャネル{index}が、そこでの丸め誤差の{share}を生む。",
    # tables of one engine
    "The token ids that were run are not known, or not the same in all.": "実行されたトークンIDが不明であるか、全体で同じではない。",
    "All variants ran the same {n} ids; which ids the prompt should give was not checked.": "すべてのバリアントが同じ{n}個のIDを実行した。プロンプトから得られるべきIDは確認していない。",
    "{engine} gives {tokens}.": "{engine}の出力は{tokens}である。",
    "{token} in {variant}": "{variant}で{token}",
    "token {facts}": "トークン（{facts}）",
    "rank {rank}": "順位{rank}",
    "Rank {rank} in {variant}": "{variant}の順位{rank}",
    "{ranks} is no greedy choice.": "{ranks}は貪欲法による選択ではない。",
    "One token alone does not say whether it is right: there is no original, and no exact execution of the same file.": (
        "1つのトークンだけでは正しいかどうかはわからない：元モデルも、同じファイルの厳密計算もない。"
    ),
    "That types disagree does not say which of them is right, or whether one is: there is no original, and no exact execution of the same file.": (
        "量子化方式によって異なることからは、どれが正しいのか、正しいものがあるのかもわからない：元モデルも、同じファイルの厳密計算もない。"
    ),
    "That types agree does not say that they are right: there is no original, and no exact execution of the same file.": (
        "量子化方式によらず一致することは、正しいことを意味しない：元モデルも、同じファイルの厳密計算もない。"
    ),
    "No token of {engine} is known, and there is no original, and no exact execution of the same file.": "{engine}のトークンは不明であり、元モデルも、同じファイルの厳密計算もない。",
    "The RMS of the same first and last layer is not known for two variants.": "2つのバリアントについて、同じ最初と最後の層のRMSがわからない。",
    "RMS grows {growth}, at most {spread} apart: something beside the architecture is in it, and which variant is off is open.": (
        "RMSは{growth}になり、差は最大{spread}である。アーキテクチャ以外の要因が含まれるが、どのバリアントがずれているかは不明である。"
    ),
    "RMS grows {growth}, at most {spread} apart, so it hardly depends on the quantization.": "RMSは{growth}になり、差は最大{spread}なので、量子化にはほとんど依存しない。",
    "Growth that no quantization changes is not its damage, and RMSNorm divides it out again in every layer: by itself it is no evidence of an error. The original in float32 shows whether it grows so by nature.": (
        "どの量子化でも変わらない成長は量子化による劣化ではなく、各層のRMSNormで割り戻される。それだけでは誤りの証拠にならない。本来の成長かどうかはfloat32の元モデルでわかる。"
    ),
    "The mean of the first and last layer is not known for two variants.": "2つのバリアントについて、最初と最後の層の平均がわからない。",
    "The mean goes {means}: opposite signs at the end, where |mean|/RMS is {ratios}.": "平均は{means}と変化し、最後の層での符号は逆である。そこでの|平均|/RMSは{ratios}である。",
    "The mean goes {means}: the same sign at the end, where |mean|/RMS is {ratios}.": "平均は{means}と変化し、最後の層での符号は同じである。そこでの|平均|/RMSは{ratios}である。",
    "Flagged, over {times} times the other variants: the {activation} mean of {name} in layer {layer}, {share} of its RMS.": (
        "他のバリアントの{times}倍を超える異常値：{name}の層{layer}の{activation}平均（そのRMSの{share}）。"
    ),
    "Flagged, over {times} times the other variants: the {activation} mean of {name} in layer {layer}, {share} of its RMS, and {n} more.": (
        "他のバリアントの{times}倍を超える異常値：{name}の層{layer}の{activation}平均（そのRMSの{share}）、ほか{n}件。"
    ),
    "That the variants differ is shown; that quantization is the cause is not: a fault of the engine moves means, too.": (
        "バリアントの間に違いがあることは示されたが、量子化が原因であることは示されていない。エンジンの誤りも平均を動かす。"
    ),
    "All statistics come from {engine}: nothing independent ran the same file on the same token ids.": "統計量はすべて{engine}によるものであり、独立した実装が同じファイルを同じトークンIDで実行していない。",
    "{other} gave {tokens}: one token of another run, whose ids and file hash are not recorded. That it looks odd, too, does not clear {engine}.": (
        "{other}の出力は{tokens}だが、IDもファイルのハッシュも記録されていない別の実行の1トークンである。それも奇妙に見えるからといって、{engine}の疑いは晴れない。"
    ),
    "{other} gave {tokens}: one token, its id not known, of another run, whose ids and file hash are not recorded. That it looks odd, too, does not clear {engine}.": (
        "{other}の出力は{tokens}だが、IDもファイルのハッシュも記録されていない別の実行の1トークンであり、そのIDも不明である。それも奇妙に見えるからといって、{engine}の疑いは晴れない。"
    ),
    "Statistics of activations do not show a damaged tensor apart from other causes.": "活性値の統計量では、壊れたテンソルを他の原因と区別できない。",
    "That needs the exact and the expected arithmetic on the same file.": "同じファイルでの厳密計算と、想定される演算の結果が必要である。",
    # what to record next
    "With every trace note the token ids, the sha256 of the file, the positions, the backend (CPU, Metal, CUDA) and the batch size: without them a difference proves nothing.": (
        "すべてのトレースに、トークンID、ファイルのsha256、位置、バックエンド（CPU、Metal、CUDA）、バッチサイズを記録する。これらがなければ相違は何の証明にもならない。"
    ),
    "{n} bytes a tap": "1タップあたり{n}バイト",
    "{n} bytes a tap, {size} a prompt": "1タップあたり{n}バイト、1プロンプトあたり{size}",
    "Record fingerprints of {taps} on two prompts, at all positions: {cost}. They show every kind of difference and find the first bad layer.": (
        "2つのプロンプトで全位置の{taps}のフィンガープリントを記録する（{cost}）。あらゆる種類の相違が現れ、最初の異常な層がわかる。"
    ),
    "First record fingerprints of {taps} on two prompts, at all positions: {cost}. They show every kind of difference and find the first bad layer.": (
        "まず2つのプロンプトで全位置の{taps}のフィンガープリントを記録する（{cost}）。あらゆる種類の相違が現れ、最初の異常な層がわかる。"
    ),
    "{size} a layer": "1層あたり{size}",
    "the head": "ヘッド",
    "Record the first layer whose `l_out` differs in full, its input and all its taps, on {tokens} (I: its number).": (
        "`l_out`が異なる最初の層を、入力とすべてのタップを含めて{tokens}で完全に記録する（I：層の番号）。"
    ),
    "Then record the first layer whose `l_out` differs in full, its input and all its taps, on {tokens} (I: its number).": (
        "次に`l_out`が異なる最初の層を、入力とすべてのタップを含めて{tokens}で完全に記録する（I：層の番号）。"
    ),
    "Record {what} in full on {tokens} ({cost}), in this order: {taps}. Replay then convicts the operation.": (
        "{what}を{tokens}で完全に記録する（{cost}）。順序は次のとおり：{taps}。これで再計算により誤った演算が特定できる。"
    ),
    "Then record {what} in full on {tokens} ({cost}), in this order: {taps}. Replay then convicts the operation.": (
        "次に{what}を{tokens}で完全に記録する（{cost}）。順序は次のとおり：{taps}。これで再計算により誤った演算が特定できる。"
    ),
    "For llama.cpp: {command}.": "llama.cppの場合：{command}。",
    "A build of your own: {log}, then `quantscope import run.log`; it prints samples and sums of every tap.": (
        "自分でビルドしたものの場合：{log}のあと`quantscope import run.log`。各タップのサンプルと総和が出力される。"
    ),
    "For Transformers: {command}.": "Transformersの場合：{command}。",
    "For RusTorch: write them under these names with the crate safetensors, float32, positions first.": "RusTorchの場合：crateのsafetensorsを使い、これらの名前でfloat32、位置を先頭の軸として書き出す。",
    "For RusTorch: copy the Rust function `qsfp` of docs/fingerprints.md and print its line for each of these taps, as in `{code}`.": (
        "RusTorchの場合：docs/fingerprints.mdのRustの関数`qsfp`をコピーし、これらの各タップについてその行を出力する。例：`{code}`。"
    ),
    "Of its debug log the lines `[INPUT TOKENS]`, `[POSITION]`, `[GET_EMB]`, `[LAYER i] Input`, `[LAYER i] First 10 values`, `[LAYER i] After FFN Residual (Layer Output)`, `[FINAL NORM]` and `[LOGITS STEP 0]` count; statistics alone cannot show that signals agree.": (
        "デバッグログのうち使われる行は`[INPUT TOKENS]`、`[POSITION]`、`[GET_EMB]`、`[LAYER i] Input`、`[LAYER i] First 10 values`、`[LAYER i] After FFN Residual (Layer Output)`、`[FINAL NORM]`、`[LOGITS STEP 0]`である。統計量だけでは信号の一致を示せない。"
    ),
    "Copy the function `qsfp` of docs/fingerprints.md (C, Rust, Swift, JavaScript) and print its line for each of these taps.": (
        "docs/fingerprints.mdの関数`qsfp`（C、Rust、Swift、JavaScript）をコピーし、これらの各タップについてその行を出力する。"
    ),
    "Write them as float32 arrays, positions first, under these names to a safetensors or npz file.": "これらの名前でfloat32の配列として、位置を先頭の軸にしてsafetensorsまたはnpzファイルに書き出す。",
    "Read the log with `quantscope import LOG -o T.safetensors`.": "ログは`quantscope import LOG -o T.safetensors`で読み込む。",
    "Read them with `quantscope import FILE --model MODEL --tokens IDS -o T.safetensors` (docs/importing.md).": (
        "`quantscope import FILE --model MODEL --tokens IDS -o T.safetensors`で読み込む（docs/importing.md）。"
    ),
}
