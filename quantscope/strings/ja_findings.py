"""The findings of a study in Japanese."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    # the answer
    "Of {variants}, {best} is closest to {original} (KL divergence {best_kl} nats) and {worst} farthest ({worst_kl} nats).": (
        "{variants}のうち、{original}に最も近いのは{best}（KLダイバージェンス{best_kl} nats）、最も遠いのは{worst}（{worst_kl} nats）である。"
    ),
    "{name} keeps the original's next token {token}.": "{name}は元モデルの次トークン{token}を保つ。",
    "{variants} keep the original's next token {token}.": "{variants}が元モデルの次トークン{token}を保つ。",
    "{variants} keep the original's next token {token}, down to the smallest, {best} ({weight}).": (
        "最小の{best}（{weight}）に至るまで、{variants}が元モデルの次トークン{token}を保つ。"
    ),
    "Both variants": "両方のバリアント",
    "All {n} variants": "{n}個のバリアントすべて",
    "{kept} {_keep} the original's next token {token}, {changed} {_change} it.": (
        "{kept}は元モデルの次トークン{token}を保ち、{changed}ではトークンが変わる。"
    ),
    "{kept} {_keep} the original's next token {token}, {changed} {_change} it; the smallest that keeps it is {best} ({weight}).": (
        "{kept}は元モデルの次トークン{token}を保ち、{changed}ではトークンが変わる。保つもののうち最小は{best}（{weight}）である。"
    ),
    "No variant keeps the original's next token {token}: {changed}.": ("元モデルの次トークン{token}を保つバリアントはない：{changed}。"),
    "{n} bits per weight": "重みあたり{n}ビット",
    "KL divergence {kl} nats": "KLダイバージェンス{kl} nats",
    "The variants generate the same token ({what}), and without the original nothing here tells {unknown}.": (
        "すべてのバリアントが同じトークンを生成する（{what}）。元モデルがないため、{unknown}はここからはわからない。"
    ),
    "The variants generate different tokens ({what}), and without the original nothing here tells {unknown}.": (
        "バリアントによって異なるトークンが生成される（{what}）。元モデルがないため、{unknown}はここからはわからない。"
    ),
    "whether the quantization, the engine, the file or the prompt decides it": (
        "それを決めているのが量子化、エンジン、ファイル、プロンプトのどれなのか"
    ),
    "what the unquantized weights would generate": "量子化前の重みなら何を生成するのか",
    # tokens
    "The original puts {token} (id {id}) first.": "元モデルの1位は{token}（ID {id}）である。",
    "The original puts {token} (id {id}) first with probability {chance}.": "元モデルの1位は{token}（ID {id}、確率{chance}）である。",
    "{name} puts {token} first.": "{name}の1位は{token}である。",
    "{name} puts {token} first (probability {chance} in {name}).": "{name}の1位は{token}（{name}での確率{chance}）である。",
    "{name} puts {token} first, which the original ranks {rank}.": "{name}の1位は{token}で、元モデルでは{rank}位である。",
    "{name} puts {token} first, which the original ranks {rank} (probability {chance} in {name}).": (
        "{name}の1位は{token}（{name}での確率{chance}）で、元モデルでは{rank}位である。"
    ),
    "Of the original's {n} greedy tokens the continuation stays the same in {parts}.": (
        "元モデルが貪欲法で生成した{n}トークンのうち、先頭から一致するのは{parts}である。"
    ),
    "{names} for all of them": "{names}では全部",
    "{name} for {n}": "{name}では{n}個",
    (
        "Not every token is the largest of its own logits ({what}): it was sampled or taken by other rules than greedy decoding, so "
        "different tokens may in part be an effect of sampling."
    ): (
        "自身のlogitで最大ではないトークンがある（{what}）。サンプリングなど貪欲法以外の規則で選ばれたものであり、"
        "トークンの違いの一部はサンプリングの影響かもしれない。"
    ),
    "that of {name} has rank {rank}": "{name}では{rank}位",
    "The smallest variant that keeps the top token is {name} ({weight}).": (
        "最上位トークンを保つ最小のバリアントは{name}（{weight}）である。"
    ),
    "{names} {_lose} it although larger, so keeping this one token is partly luck: go by the KL divergence.": (
        "{names}はそれより大きいのにトークンを失う。この1トークンを保つかどうかは偶然にもよるため、KLダイバージェンスで判断すべきである。"
    ),
    "This is one token of one prompt; the KL divergence is the steadier measure.": (
        "これは1つのプロンプトの1トークンにすぎず、KLダイバージェンスのほうが安定した指標である。"
    ),
    "{names} agree on {token} (id {id}).": "{names}は{token}（ID {id}）で一致する。",
    "The original does not, so here agreement means that they share an error, not that they are right.": (
        "元モデルは異なるトークンを生成するので、ここでの一致は同じ誤りを共有していることを意味し、正しいことを意味しない。"
    ),
    "Agreement across quantizations shows that their formats are decoded consistently; it does not show that an engine is right.": (
        "量子化方式をまたぐ一致は、各形式の復号が一貫していることを示す。エンジンが正しいことを示すものではない。"
    ),
    (
        "{groups} give every tensor the same type here and so are one and the same: where blocks do not fill the rows of a model, a preset "
        "falls back to other types."
    ): (
        "{groups}は、このモデルではすべてのテンソルの型が同じになるため同一である。"
        "ブロックがモデルの行を割り切らないところでは、プリセットは別の型で代用する。"
    ),
    # limits
    "No variant is the original (F16 or F32 weights): how much of any difference is quantization damage cannot be concluded.": (
        "元モデル（F16またはF32の重み）にあたるバリアントがないため、違いのうちどれだけが量子化による劣化なのかは結論できない。"
    ),
    (
        "All numbers come from {engine}; no independent reference ran the same files on the same token ids, so a bug of that engine is "
        "neither shown nor ruled out."
    ): (
        "数値はすべて{engine}によるものである。独立した参照実装が同じファイルを同じトークンIDで実行していないため、"
        "このエンジンのバグは示されても否定されてもいない。"
    ),
    (
        "All variants were run by the same reference with exact arithmetic, but the original's distributions come from {original}: the "
        "arithmetic of whatever program wrote that file is in every difference, beside the weights'."
    ): (
        "すべてのバリアントは同じ参照実装が厳密計算で実行したが、元モデルの分布は{original}から取ったものである。"
        "どの差にも、重みの影響のほかに、そのファイルを書いたプログラムの演算の影響が含まれる。"
    ),
    (
        "All variants were run by the same reference with exact arithmetic, so what differs comes from the weights alone. An engine that "
        "gives something else for one of these files and the same token ids differs for another reason: its own arithmetic, its code, or "
        "other ids."
    ): (
        "すべてのバリアントは同じ参照実装が厳密計算で実行したので、違いは重みだけから生じている。"
        "あるエンジンが同じファイルと同じトークンIDで異なる結果を出すなら、原因は別にある：エンジン自身の演算、コード、あるいは異なるID。"
    ),
    # KL divergence and perplexity
    "KL divergence from {original}: {order} nats, the mean of {positions}.": (
        "{original}からのKLダイバージェンス：{order} nats（{positions}の平均）。"
    ),
    "That is also the order of the sizes, largest first.": "これはサイズの大きい順でもある。",
    "{pairs}.": "{pairs}。",
    "{name} is smaller and yet closer than {other}": "{name}は{other}より小さいのに元モデルに近い",
    "Same top token at {shares} of the positions.": "最上位トークンが一致する位置の割合：{shares}。",
    "The top token is the original's at every position in every variant.": (
        "どのバリアントでも、すべての位置で最上位トークンが元モデルと一致する。"
    ),
    "{positions} {_are} few: give a text with --text for figures to rely on.": (
        "{positions}では少ない。信頼できる数値を得るには--textでテキストを与える。"
    ),
    "On the same positions (95 % intervals of the mean difference of KL [nats], over {units}): {pairs}.": (
        "同じ位置での比較（KLの差の平均 [nats] の95 %信頼区間、{units}）：{pairs}。"
    ),
    "{better} is better than {other} by {nats} ({interval})": "{better}は{other}より{nats}だけ優れる（{interval}）",
    "{name} and {other} ({interval})": "{name}と{other}（{interval}）",
    "not told apart: {pairs}, whose order may be chance: more --chunks would tell": (
        "区別できない組：{pairs}。順序は偶然かもしれず、--chunksを増やせばわかる"
    ),
    "Float32 rounding alone makes a KL divergence of {nats} nats; {names} {_are} within {times} times that: no difference is shown there.": (
        "float32の丸めだけで{nats} natsのKLダイバージェンスが生じる。{names}はその{times}倍以内であり、違いがあるとはいえない。"
    ),
    "Float32 rounding alone makes a KL divergence of {nats} nats: the smallest one measured, {name} {smallest}, is {times} times as large.": (
        "float32の丸めだけで{nats} natsのKLダイバージェンスが生じる。測定した最小値、{name}の{smallest}は、その{times}倍である。"
    ),
    (
        "The original is the file {original}, log-probabilities of 16 bits: each is off by {half} nats at most, and so is the KL divergence "
        "of a position."
    ): (
        "元モデルは16ビットの対数確率のファイル{original}である。各値の誤差は最大{half} natsで、1位置のKLダイバージェンスの誤差も同じである。"
    ),
    "Tokens more than 16 nats below the most probable one are in no divergence; they have {missing} of the probability.": (
        "最も確率の高いトークンより16 natsを超えて低いトークンは、どのダイバージェンスにも含まれない。その確率は合わせて{missing}である。"
    ),
    "The mean divergence of {names} is within that rounding: no difference is shown there.": (
        "{names}の平均ダイバージェンスはこの丸めの範囲内であり、違いがあるとはいえない。"
    ),
    "What the program that wrote the file computes otherwise than the reference here is in every divergence, too.": (
        "ファイルを書いたプログラムの計算がここの参照実装と異なる分も、すべてのダイバージェンスに含まれる。"
    ),
    "Perplexity is {base} in {original}; {others}.": "パープレキシティ：{original} {base}、{others}。",
    "{names} below the original: on this text the error happens to help, which does not make the variant better.": (
        "{names}は元モデルを下回る。このテキストでは誤差がたまたま有利に働いただけで、バリアントが優れていることにはならない。"
    ),
    # layers
    "layer {layer}": "層{layer}",
    "from layer {first} to layer {last}": "層{first}から層{last}まで",
    "{layers}, {first} to {last}": "{first}〜{last}の{layers}",
    "Output RMS grows {growth} {where} in the original.": "出力RMSは元モデルでは{where}に{growth}になる。",
    "Output RMS grows {growth} {where}.": "出力RMSは{where}に{growth}になる。",
    "They are within {spread} of each other, so it hardly depends on which of these quantizations is used.": (
        "互いの差は{spread}以内であり、どの量子化方式かにはほとんど依存しない。"
    ),
    "The largest is {spread} above the smallest.": "最大値は最小値より{spread}大きい。",
    "Whether the original grows as much, which would make it architecture and not damage, cannot be told without it.": (
        "元モデルも同じだけ成長するなら劣化ではなくアーキテクチャの性質だが、元モデルなしでは判断できない。"
    ),
    (
        "Output RMS grows {growth} {where} in the original and {others} in the other variants, which is little (at most {spread} apart): no "
        "sign of damage."
    ): ("出力RMSは{where}に元モデルで{growth}、他のバリアントで{others}になる。成長は小さく、差も最大{spread}であり、劣化の兆候はない。"),
    (
        "Output RMS grows {growth} {where} in the original and {others} in the other variants (at most {spread} apart): the growth belongs "
        "to the architecture, it is not quantization damage."
    ): (
        "出力RMSは{where}に元モデルで{growth}、他のバリアントで{others}になる（差は最大{spread}）。"
        "この成長はアーキテクチャの性質であり、量子化による劣化ではない。"
    ),
    (
        "Output RMS grows {growth} {where} in the original and {others} in the other variants, which is little; {deviations} away from the "
        "original: that is damage."
    ): (
        "出力RMSは{where}に元モデルで{growth}、他のバリアントで{others}になり、成長は小さい。"
        "元モデルからのずれは{deviations}であり、これは劣化である。"
    ),
    (
        "Output RMS grows {growth} {where} in the original and {others} in the other variants; {deviations} away from the original: the "
        "growth itself belongs to the architecture, this deviation does not."
    ): (
        "出力RMSは{where}に元モデルで{growth}、他のバリアントで{others}になる。元モデルからのずれは{deviations}である。"
        "成長そのものはアーキテクチャの性質だが、このずれはそうではない。"
    ),
    "{name} by {change}": "{name}で{change}",
    "Mean of the layer output from layer {first} to layer {last}: {drifts}.": "層{first}から層{last}までの出力の平均：{drifts}。",
    "Mean of the layer output from layer {first} to layer {last}: {drifts}; {alike} likewise ({multiples}).": (
        "層{first}から層{last}までの出力の平均：{drifts}；{alike}も同様（{multiples}）。"
    ),
    "{name} {first} → {last} (from exactly zero, so it has no multiple)": "{name} {first} → {last}（ちょうど0から始まるため倍率はない）",
    "{name} {first} → {last} ({drift}, it changes its sign)": "{name} {first} → {last}（{drift}、符号が反転）",
    "{name} {first} → {last} ({drift}, towards zero)": "{name} {first} → {last}（{drift}、0に近づく）",
    "{name} {first} → {last} ({drift}, positive direction)": "{name} {first} → {last}（{drift}、正方向）",
    "{name} {first} → {last} ({drift}, negative direction)": "{name} {first} → {last}（{drift}、負方向）",
    "The variants drift apart: {up} to the positive side, {down} to the negative.": (
        "バリアントによってドリフトの方向が分かれる：{up}は正方向、{down}は負方向。"
    ),
    "All end on the original's side of zero.": "最後の層での符号はすべて元モデルと同じである。",
    "{names} {_end} on the other side of zero than the original.": "{names}は最後の層での符号が元モデルと逆である。",
    "Of the {drift} in {name}, {growth} is the growth of RMS and {ratio} the change of |mean|/RMS, from {first} to {last}.": (
        "{name}の{drift}のうち、{growth}はRMSの成長、{ratio}は|平均|/RMSの変化（{first}から{last}へ）である。"
    ),
    "The first mean is near zero in {whose} (under {limit} of RMS): multiples of so small a number say little.": (
        "最初の平均は{whose}で0に近い（RMSの{limit}未満）。これほど小さい値に対する倍率にはあまり意味がない。"
    ),
    "every variant": "すべてのバリアント",
    "Against the original the last mean is off by at most {moved} of its RMS ({name}).": (
        "最後の平均の元モデルからのずれは、最大でもそのRMSの{moved}（{name}）である。"
    ),
    "{name} {mean}, most in layer {layer} ({most})": "{name}は{mean}、最大は層{layer}（{most}）",
    "Share of the tokens that go through other experts than in the original, mean of the layers: {shares}.": (
        "元のモデルと異なるエキスパートを通るトークンの割合（層の平均）：{shares}。"
    ),
    "No {activation} mean stands out: none has a |mean|/RMS over {rule} times the median of the other variants.": (
        "{activation}平均に異常値はない：|平均|/RMSが他のバリアントの中央値の{rule}倍を超えるものはない。"
    ),
    "{n} {activation} {_mean} {_stand} out with a |mean|/RMS over {rule} times the median of the other variants: {cells}.": (
        "{activation}平均{n}個が異常値であり、|平均|/RMSが他のバリアントの中央値の{rule}倍を超える：{cells}。"
    ),
    "{name} layer {layer}, mean {mean}, {share} of its RMS, {times} the others' {others}": (
        "{name}の層{layer}、平均{mean}、そのRMSの{share}で他の{others}の{times}"
    ),
    "With one other variant the rule cannot say which of the two is off.": (
        "比較対象が1つだけなので、2つのうちどちらがずれているかはこの規則では判断できない。"
    ),
    "Error of the layer output against the original (NMSE in dB, first → last layer): {errors}.": (
        "層の出力の元モデルに対する誤差（NMSE [dB]、最初の層 → 最後の層）：{errors}。"
    ),
    "{name}: from layer {layer} on it grows by {after} dB a layer, before by {before}.": (
        "{name}：層{layer}以降は1層あたり{after} dB、それより前は{before} dB増える。"
    ),
    "{layers} are too few to say from which it grows faster than before; the steepest single step is {db} dB at layer {layer} ({name}).": (
        "{layers}では少なすぎて、どの層から増え方が速くなるかはわからない。1層で最大の増加は層{layer}の{db} dB（{name}）である。"
    ),
    (
        "In no variant is there a layer from which it grows clearly faster than before; the steepest single step is {db} dB at layer "
        "{layer} ({name})."
    ): "どのバリアントにも、そこから増え方が明らかに速くなる層はない。1層で最大の増加は層{layer}の{db} dB（{name}）である。",
    "{names}: no layer from which it grows clearly faster than before; the steepest single step is {db} dB at layer {layer} ({name}).": (
        "{names}：増え方が明らかに速くなる層はない。1層で最大の増加は層{layer}の{db} dB（{name}）である。"
    ),
    "NaN or infinity in {where}: the numbers after that point mean nothing.": (
        "NaNまたは無限大がある：{where}。それより後の数値に意味はない。"
    ),
    "{name} (first in the logits)": "{name}（最初に現れるのはlogit）",
    "{name} (first in layer {layer})": "{name}（最初に現れるのは層{layer}）",
    # operations
    "The operation whose result differs most from the original's over the whole text: {operations}.": (
        "テキスト全体で結果が元モデルと最も異なる演算：{operations}。"
    ),
    "{name} {tap} ({db} dB)": "{name}は{tap}（{db} dB）",
    "{name} {tap} of layer {layer} ({db} dB)": "{name}は層{layer}の{tap}（{db} dB）",
    (
        "The original has massive activations in {layers}, the largest {largest} at token {token} of a chunk, channel {channel}: they "
        "belong to the model."
    ): (
        "元モデルは{layers}に巨大活性値をもち、最大値は{largest}（チャンク内のトークン{token}、チャネル{channel}）である。"
        "これはモデルに固有のものである。"
    ),
    "It has {n} of them in the residual stream; another number in {others}.": ("残差ストリームには{n}個ある。個数が異なるもの：{others}。"),
    # engines
    "Within what its arithmetic predicts at every tap: {runs}. What such a file gets wrong comes from the file, not from the engine.": (
        "すべてのタップで演算から予測される範囲内：{runs}。そのファイルの誤りはエンジンではなくファイルに由来する。"
    ),
    "{engine} on {file} (logits {error})": "{file}での{engine}（logit {error}）",
    "{engine} on {file} differs from an exact run of the same file. {answer}": (
        "{file}での{engine}は同じファイルの厳密計算と異なる。{answer}"
    ),
    "{engine} on {file} failed: {failure}": "{file}での{engine}は失敗した：{failure}",
}
