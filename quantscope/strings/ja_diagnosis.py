"""The diagnosis in Japanese: its answer, the split of the logits, the pieces of evidence and the probes."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    "{n} taps": "{n}タップ",
    "{n} operations": "{n}演算",
    "{n} faults": "{n}件の誤り",
    "the engine": "エンジン",
    ", or ": "、または",
    " or ": "または",
    "no": "いいえ",
    # headings
    "quantscope diagnosis of {model} against {engine}": "{model}と{engine}の診断（quantscope）",
    "Evidence, cheapest first": "証拠（手軽なものから順に）",
    "evidence": "証拠",
    "conclusion": "結論",
    "found": "わかったこと",
    "agrees": "一致",
    "{mark} differs": "{mark} 相違",
    "not measured": "未測定",
    "Operations that are wrong by themselves": "それ自体が誤っている演算",
    "Operations that are wrong by themselves; {n} more are in --json": "それ自体が誤っている演算（ほか{n}件は--jsonにある）",
    "Known faults that explain what differs ({n} tried)": "相違を説明する既知の誤り（{n}件を試行）",
    "fault": "誤り",
    "consistent": "整合",
    "of the graph": "計算グラフ中",
    "Next": "次に検証すべきこと",
    "How to measure it again": "再測定の方法",
    "Floor: {source}.": "ノイズフロア：{source}。",
    # the answer
    "The prompt in one batch is within its floors; the probe `{probe}` is not.": "プロンプトを1バッチで実行した結果はノイズフロア内だが、プローブ`{probe}`はそうではない。",
    "Activation rounding: the token changes because {engine} rounds activations, as it is expected to; neither the code nor the weights are at fault.": (
        "活性値の丸め：トークンが変わるのは、{engine}が想定どおり活性値を丸めるからである。コードにも重みにも誤りはない。"
    ),
    "The quantization: computed exactly, the file already gives another token than the original.": "量子化：厳密に計算しても、このファイルは元モデルと異なるトークンを出す。",
    "the trace does not say its token ids, and it has no whole tensors that could be judged without. Give what the engine ran with `--tokens 1,2,3` or `--prompt TEXT`.": (
        "トレースにトークンIDがなく、IDなしで判定できるテンソル全体の記録もない。エンジンが実行した入力を`--tokens 1,2,3`または`--prompt TEXT`で与える。"
    ),
    "The prompt: other token ids reached the engine: {found}": "プロンプト：エンジンに渡ったトークンIDが異なる：{found}",
    "The file: {found}": "ファイル：{found}",
    "Not comparable: {found}": "比較できない：{found}",
    "The engine: {engine} {fault}. With this fault the reference shows what the engine showed.": (
        "エンジン：{engine}は{fault}。この誤りを加えると、参照実装もエンジンと同じ結果を示す。"
    ),
    "The engine: {engine} has {faults} at once: {each}. Together they give what the engine showed.": (
        "エンジン：{engine}には同時に{faults}がある：{each}。これらを合わせるとエンジンと同じ結果になる。"
    ),
    "({k}) it {fault}": "（{k}）{fault}",
    "{fault} [{name}; {where}]": "{fault} [{name}；{where}]",
    "{fault} [{name}; {where}] (or {twins}: this evidence cannot tell)": "{fault} [{name}；{where}]（または{twins}。この証拠では区別できない）",
    "The engine: recomputed from its own inputs, {operations} of {engine} {_are} wrong, first {tap} ({operation}).": (
        "エンジン：{engine}自身の入力から再計算すると{operations}が誤っており、最初は{tap}（{operation}）である。"
    ),
    "None of the known faults explains {taps}.": "{taps}を説明する既知の誤りはない。",
    "The engine: {engine} differs from the exact run of the same file by more than its arithmetic explains; the first tap beyond its floor is {tap} ({operation}).": (
        "エンジン：{engine}と同じファイルの厳密計算との差は、その演算で説明できる大きさを超える。最初にノイズフロアを超えるタップは{tap}（{operation}）である。"
    ),
    "The engine: {engine} differs from the exact run of the same file by more than its arithmetic explains.": (
        "エンジン：{engine}と同じファイルの厳密計算との差は、その演算で説明できる大きさを超える。"
    ),
    "None of the known faults is consistent with it.": "これと整合する既知の誤りはない。",
    "The nearest, {fault}, explains {share} of it.": "最も近い{fault}はその{share}を説明する。",
    "Arithmetic that is not modelled: {engine} exceeds the predicted rounding from {tap} on, but a little and without a direction (gain 1), as another rounding would.": (
        "モデル化されていない演算：{engine}は{tap}以降で予測された丸めを超えるが、超え方はわずかで方向性もなく（ゲイン1）、別の丸め方による差のように見える。"
    ),
    "a tap": "あるタップ",
    "Not shown to be a fault.": "誤りであるとはいえない。",
    "Nothing found beyond the expected arithmetic of {engine} at {taps}.": "{taps}において、{engine}の想定される演算を超えるものは見つからなかった。",
    "{n} of the {total} known faults would have shown and are excluded.": "既知の誤り{total}件のうち{n}件は、あれば現れたはずなので除外される。",
    "Not testable with this evidence: {faults}.": "この証拠では検証できないもの：{faults}。",
    "What would tell them apart: {what}.": "区別する手段：{what}。",
    "an operation of its own": "固有の演算",
    "the whole run": "実行全体",
    "layer {layer} alone": "層{layer}のみ",
    "layer {layer} on": "層{layer}以降",
    "{faults} in layer {layer} alone": "{faults}（層{layer}のみ）",
    "{faults} from layer {layer} on": "{faults}（層{layer}以降）",
    # the logits
    "Quantization alone raises KL from 0 to {quantization} nats; this engine's expected arithmetic brings it to {expected}; the engine measures {engine}: {judgement}.": (
        "量子化だけでKLは0から{quantization} natsに増え、このエンジンの想定される演算で{expected}になる。エンジンの実測値は{engine}であり、{judgement}。"
    ),
    "Against the exact execution of the same file (there is no original, so quantization is not measured) this engine's expected arithmetic raises KL from 0 to {expected} nats; the engine measures {engine}: {judgement}.": (
        "同じファイルの厳密計算に対して（元モデルがないため量子化の影響は測定していない）、このエンジンの想定される演算でKLは0から{expected} natsに増える。エンジンの実測値は{engine}であり、{judgement}。"
    ),
    "{engine} nats from the exact execution of its own file, expected {expected}": "そのファイルの厳密計算から{engine} nats、想定は{expected}",
    "some of its logits are not finite, which is unexplained, implementation": "一部のlogitが有限でない。これは説明がつかず、実装の問題である",
    "as near to the original, but not in the same way: it is {own}, which is unexplained, implementation": (
        "元モデルへの近さは同程度だが、ずれ方が異なる（{own}）。これは説明がつかず、実装の問題である"
    ),
    "the rise from {expected} is unexplained, implementation": "{expected}からの増加は説明がつかず、実装の問題である",
    "the rise from {expected} is unexplained, implementation ({own})": "{expected}からの増加は説明がつかず、実装の問題である（{own}）",
    "it rounds less than expected; nothing found beyond expected arithmetic": "丸めは想定より小さく、想定される演算を超えるものは見つからなかった",
    "it rounds less than expected ({own}); nothing found beyond expected arithmetic": "丸めは想定より小さく（{own}）、想定される演算を超えるものは見つからなかった",
    "nothing found beyond expected arithmetic": "想定される演算を超えるものは見つからなかった",
    "nothing found beyond expected arithmetic ({own})": "想定される演算を超えるものは見つからなかった（{own}）",
    "Greedy token of the last position: original {original}, quantized file exactly {exact}, expected arithmetic {expected}, engine {engine}; of {positions} changed: {changes}.": (
        "最後の位置の貪欲トークン：元モデル{original}、量子化ファイルの厳密計算{exact}、想定される演算{expected}、エンジン{engine}。{positions}のうち変化したもの：{changes}。"
    ),
    "Greedy token of the last position: quantized file exactly {exact}, expected arithmetic {expected}, engine {engine}; of {positions} changed: {changes}.": (
        "最後の位置の貪欲トークン：量子化ファイルの厳密計算{exact}、想定される演算{expected}、エンジン{engine}。{positions}のうち変化したもの：{changes}。"
    ),
    "{n} by quantization": "量子化によるもの{n}",
    "{n} by the expected arithmetic": "想定される演算によるもの{n}",
    "{n} by the engine": "エンジンによるもの{n}",
    "The expected arithmetic itself changes the token from {exact} to {expected}; which activations do it was not tested.": (
        "想定される演算そのものがトークンを{exact}から{expected}に変える。どの活性値によるかは検証していない。"
    ),
    "The expected arithmetic itself changes the token from {exact} to {expected}, but exact activations restore it at no tap: it is not the rounding of products' activations alone.": (
        "想定される演算そのものがトークンを{exact}から{expected}に変えるが、どのタップの活性値を厳密な値にしても元に戻らない。行列積の活性値の丸めだけが原因ではない。"
    ),
    "The expected arithmetic changes the token from {exact} to {expected} ({where}), but the engine gives {engine}.": (
        "想定される演算はトークンを{exact}から{expected}に変えるが（{where}）、エンジンの出力は{engine}である。"
    ),
    "Activation rounding alone changes the token from {exact} to {expected} as in the engine ({where}), but it is not all.": (
        "活性値の丸めだけでトークンはエンジンと同じく{exact}から{expected}に変わるが（{where}）、それがすべてではない。"
    ),
    "Activation rounding, not the weights and no fault found in the code: the emulated arithmetic gives the engine's token {engine}, and {where}.": (
        "原因は活性値の丸めである。重みではなく、コードにも誤りは見つからない：演算をエミュレートするとエンジンと同じトークン{engine}になり、{where}。"
    ),
    "exact activations at {places} restore token {exact}, and all but {left} of the error of the logits goes with it": (
        "{places}の活性値を厳密な値にするとトークン{exact}に戻り、logitの誤差も{left}を残して消える"
    ),
    "exact activations at {places} restore token {exact}, and all but {left} of the error of the logits goes with it; in exact logits the two tokens are only {gap} apart, where smaller changes decide as well": (
        "{places}の活性値を厳密な値にするとトークン{exact}に戻り、logitの誤差も{left}を残して消える。厳密なlogitでは2つのトークンの差は{gap}しかなく、より小さな変化でも結果が変わる"
    ),
    "channel {index} of {tap}, {times} times the RMS, sets the scale of blocks of {block} that make {share} of the rounding error there": (
        "{tap}のチャネル{index}（RMSの{times}倍）が{block}要素のブロックのスケールを決め、そこでの丸め誤差の{share}を生む"
    ),
    "{channels}.": "{channels}。",
    # local replay
    "Local replay: all {n} operations are right, recomputed from the trace's own inputs.": "局所再計算：トレース自身の入力から再計算した{n}演算はすべて正しい。",
    "Local replay, from the trace's own inputs: {operations} wrong by themselves, {named}; {n} right.": "トレース自身の入力からの局所再計算：それ自体が誤っているのは{operations}（{named}）、正しいのは{n}演算。",
    "{operations} could not be recomputed: their inputs or outputs are not in the trace.": "入力または出力がトレースにないため、{operations}は再計算できなかった。",
    "{tap} ({operation}; NMSE {error}, floor {floor})": "{tap}（{operation}、NMSE {error}、ノイズフロア{floor}）",
    "the whole layer": "層全体",
    # pieces of evidence
    "SHA-256 of the file": "ファイルのSHA-256",
    "token ids": "トークンID",
    "{engine} ran the file itself.": "{engine}がこのファイルそのものを実行した。",
    "{engine} was given the ids of the reference.": "{engine}には参照実装と同じIDを与えた。",
    "First tap beyond its floor: {tap} ({shows}).": "最初にノイズフロアを超えるタップ：{tap}（{shows}）。",
    "Nearest to its floor: {tap}.": "ノイズフロアに最も近いタップ：{tap}。",
    "All {n} taps are within their floor.": "{n}タップすべてがノイズフロア内である。",
    "{trace} does not say the hash of its file: that it ran this one is taken on trust.": "{trace}にはファイルのハッシュがない。このファイルを実行したものとみなす。",
    "Both ran the same file ({sha256}…).": "どちらも同じファイル（{sha256}…）を実行した。",
    "{trace} ran another file ({theirs}…) than {model} ({own}…): what differs between two files is not the engine's doing. Trace the engine on this file, or compare the files with `quantscope weights`.": (
        "{trace}が実行したのは{model}（{own}…）とは別のファイル（{theirs}…）である。2つのファイルの間の差はエンジンによるものではない。エンジンをこのファイルでトレースするか、`quantscope weights`でファイルを比較する。"
    ),
    "The trace does not say its ids: those given are taken on trust.": "トレースにIDがないため、与えられたIDを実行したものとみなす。",
    "The trace does not say its ids.": "トレースにIDがない。",
    "The vocabulary cannot be used: {error}": "語彙を使えない：{error}",
    "They are not those that the vocabulary makes of the text they spell: give it with --prompt.": "これらは、それが表すテキストから語彙が作るIDとは異なる。テキストを--promptで与える。",
    "The reference runs the ids of the trace.": "参照実装はトレースのIDを実行する。",
    "rows of token_embd.weight": "token_embd.weightの行",
    "rows of token_embd.weight, element by element": "token_embd.weightの行（要素ごと）",
    "The trace has no embedding.": "トレースに埋め込みがない。",
    "{n} of {total} values compared.": "{total}個中{n}個の値を比較した。",
    "compared by its fingerprint.": "フィンガープリントで比較した。",
    "compared by its statistics.": "統計量で比較した。",
    "every tap against the exact run": "全タップと厳密計算との比較",
    "{n} of {total} taps exceed their floor, first {tap}.": "{total}タップ中{n}タップがノイズフロアを超え、最初は{tap}である。",
    "{n} of {total} taps are within their floor.": "{total}タップ中{n}タップがノイズフロア内である。",
    "Nearest to it: {tap}.": "最も近いのは{tap}。",
    "every operation again from the engine's own inputs": "エンジン自身の入力からの全演算の再計算",
    "It needs the whole tensors of an operation and of its inputs.": "演算とその入力のテンソル全体が必要である。",
    "All {n} operations that could be judged are right.": "判定できた{n}演算はすべて正しい。",
    "{n} wrong by themselves, first {tap} ({operation}); {right} right.": "{n}演算がそれ自体誤っており、最初は{tap}（{operation}）。{right}演算は正しい。",
    # probes
    "one token at position 0: the embedding, the norms, every product, the feed-forward and the head; attention returns v": (
        "位置0の1トークン：埋め込み、正規化、すべての行列積、フィードフォワード、ヘッド（注意機構はvを返す）"
    ),
    "a second position: RoPE, the scale, the mask and a softmax over two keys": "2番目の位置：RoPE、スケール、マスク、2つのキーに対するsoftmax",
    "one token 4 times: every value is the same, so attention returns it whatever its weights are": "同じトークンを4回：すべての値が等しいため、重みによらず注意機構はその値を返す",
    "all rows must be the same: a softmax over the wrong axis, weights that do not sum to 1, positions added to the stream": (
        "全行が等しくなければならない：誤った軸のsoftmax、和が1にならない重み、ストリームに加えられた位置"
    ),
    "the prompt in one batch": "プロンプトを1バッチで実行",
    "the beginning of the prompt alone, against the same positions of the whole": "プロンプトの先頭だけの実行と、全体の実行の同じ位置との比較",
    "tokens that follow must change nothing before them: the causal mask, a softmax over the wrong axis": "後続のトークンは前の位置に影響してはならない：因果マスク、誤った軸のsoftmax",
    "the prompt token by token over the key/value cache": "キー・バリューキャッシュを使ったプロンプトの1トークンずつの実行",
    "every step must be as in the batch: the cache, the positions of decoded tokens, the mask of the batch": (
        "各ステップはバッチと同じでなければならない：キャッシュ、デコードしたトークンの位置、バッチのマスク"
    ),
}
