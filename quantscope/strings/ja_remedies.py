"""Recipes, sensitivities and comparisons of weights, in Japanese."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    # recipe
    "recipe": "レシピ",
    "kind": "種類",
    "size": "サイズ",
    "bpw": "bpw",
    "predicted": "予測",
    "calibration text": "較正用テキスト",
    "other text": "別のテキスト",
    "chosen": "採用",
    "search": "探索",
    "preset": "プリセット",
    "rule of thumb": "経験則",
    "search, this size": "同サイズの探索",
    "preset / search": "プリセット/探索",
    "uniform ({types})": "一様（{types}）",
    "first and last layers high ({types})": "最初と最後の層を高精度（{types}）",
    "attn_v and ffn_down high ({types})": "attn_vとffn_downを高精度（{types}）",
    "a KL divergence of {kl} nats": "KLダイバージェンス{kl} nats",
    "The preset {name}": "プリセット{name}",
    "A mix of {types}": "{types}の混合",
    "{recipe} is the best recipe found for {target}: {size}, {bpw} bits per weight, a KL divergence of {kl} nats on text that nothing was fitted to": (
        "{target}に対して見つかった最良のレシピは{recipe}である：{size}、重みあたり{bpw}ビット、あてはめに使っていないテキストでのKLダイバージェンス{kl} nats"
    ),
    "{found}. No preset of llama-quantize that quantscope writes is so small.": "{found}。quantscopeが書けるllama-quantizeのプリセットに、これほど小さいものはない。",
    "{found}. No preset of llama-quantize that quantscope writes has these types only.": "{found}。quantscopeが書けるllama-quantizeのプリセットに、これらの型だけからなるものはない。",
    "{found}; no mix that was tried is better there.": "{found}。試した混合の中にこれより良いものはない。",
    "{found}, {comparison}.": "{found}、{comparison}。",
    "beside {preset} with {kl} in {size}": "比較対象の{preset}は{size}で{kl}",
    "{change} below {preset} with {kl} in {size}": "{size}で{kl}の{preset}より{change}小さい",
    "{change} above {preset} with {kl} in {size}": "{size}で{kl}の{preset}より{change}大きい",
    "{comparison} (95% interval of the ratio: {low} to {high})": "{comparison}（比の95%信頼区間：{low}〜{high}）",
    "Measured with the exact forward, weighted encoding, on {chunks} of the calibration text and {others} of text that only judges, of {n_ctx} tokens each; all positions count.": (
        "重要度で重み付けした符号化と厳密な順伝播により、較正用テキストの{chunks}と判定専用テキストの{others}（各{n_ctx}トークン）で測定した。全位置を対象とする。"
    ),
    "{chunks} that judge: the order of close candidates is uncertain. Give a longer text.": "判定に使うのは{chunks}：差の小さい候補の順序は不確かである。より長いテキストを与える。",
    "Presets that fit, but have types that --types does not allow: {names}.": "サイズは収まるが、--typesで許されていない型を含むプリセット：{names}。",
    "Presets whose types quantscope does not write, or that equal another one here: {names}.": "quantscopeが書けない型を含むか、ここでは他と同一になるプリセット：{names}。",
    "Sizes are those of llama-quantize's file; quantscope's says beside what it was made from, for which the search leaves room.": (
        "サイズはllama-quantizeのファイルのものである。quantscopeのファイルには作成元の情報も入るため、探索ではその分の余裕を残している。"
    ),
    "Rules of thumb that fit, with the KL divergence of the chosen recipe as 1: {rules}.": "サイズの収まる経験則のKLダイバージェンス（採用したレシピを1とする）：{rules}。",
    "{name} {times} in {size}": "{name}は{size}で{times}",
    "Candidates that fit: KL divergence in nats per token, predicted and measured": "条件を満たす候補：1トークンあたりのKLダイバージェンス [nats]、予測と実測",
    "The lowest measured KL divergence on the other text is chosen; what was not measured was worse by prediction.": (
        "別のテキストで実測したKLダイバージェンスが最小のものを採用した。測定していない候補は予測の段階で劣っていた。"
    ),
    "Size against predicted KL divergence in nats per token: presets, and the search at sizes along the range": (
        "サイズと1トークンあたりの予測KLダイバージェンス [nats]：プリセットと、範囲内の各サイズでの探索"
    ),
    # sensitivity
    "quantscope sensitivity of {model}": "{model}の感度分析（quantscope）",
    "role": "役割",
    "sum": "合計",
    "matrix": "行列",
    "shape": "形状",
    "in {type}": "{type}でのサイズ",
    "Storing this model in {type} changes nothing.": "このモデルを{type}で保存しても何も変わらない。",
    "All matrices in {type}: about {total} nats per token, if the errors only add up; of it {shares}. The most sensitive one is {name} with {kl} nats.": (
        "すべての行列を{type}にすると、誤差が単純に加算されるなら1トークンあたり約{total} nats。内訳は{shares}。最も感度の高い行列は{name}（{kl} nats）である。"
    ),
    "Predicted from {chunks} of {n_ctx} tokens: each figure is the mean KL divergence when one matrix alone is stored in that type.": (
        "{n_ctx}トークンの{chunks}から予測した値である。各数値は、1つの行列だけをその型で保存したときの平均KLダイバージェンスを表す。"
    ),
    "{chunks} only: the figures of single matrices are uncertain by tens of percent. Give a longer text, or more of it with `--chunks`.": (
        "{chunks}だけなので、個々の行列の値には数十%の不確かさがある。より長いテキストを与えるか、`--chunks`で使う量を増やす。"
    ),
    "The choice of the experts is taken as it is: where errors send tokens to other experts, a matrix before a router costs more than is predicted. `quantscope study` counts such tokens, and `quantscope recipe` decides by measurement.": (
        "エキスパートの選択は元のままとして予測している。誤差がトークンを別のエキスパートへ送る場合、ルーターより前の行列のコストは予測より大きい。"
        "そのようなトークンは`quantscope study`が数え、`quantscope recipe`は測定で決める。"
    ),
    "Another type where blocks do not fill the rows, as in llama-quantize: {names}.": "ブロックが行を割り切らないため、llama-quantizeと同じく別の型になったもの：{names}。",
    "KL divergence in 10⁻⁶ nats per token, one matrix at a time in {type}; {half} half of the largest cell or more, {quarter} a quarter, {eighth} an eighth, {sixteenth} a sixteenth": (
        "行列を1つずつ{type}にしたときの1トークンあたりのKLダイバージェンス [10⁻⁶ nats]。{half} 最大のセルの1/2以上、{quarter} 1/4以上、{eighth} 1/8以上、{sixteenth} 1/16以上"
    ),
    "By role: the sum of its matrices, in 10⁻⁶ nats per token": "役割ごと：行列の合計、1トークンあたり [10⁻⁶ nats]",
    "By layer: the sum of its matrices, in 10⁻⁶ nats per token": "層ごと：行列の合計、1トークンあたり [10⁻⁶ nats]",
    "The most sensitive matrices in {type}, in 10⁻⁶ nats per token": "{type}で最も感度の高い行列、1トークンあたり [10⁻⁶ nats]",
    # weights
    "tensor": "テンソル",
    "explained ({times}×)": "型による説明（{times}倍）",
    "bad blocks": "異常ブロック",
    "verdict": "判定",
    "equal": "同一",
    "explained": "説明可能",
    "blocks": "ブロック破損",
    "differs": "相違",
    "only in A": "Aのみ",
    "only in B": "Bのみ",
    "{n} of {total}": "{n}/{total}",
    "{n} matrices": "{n}行列",
    "{n} blocks": "{n}ブロック",
    "{n} corrupt blocks": "破損ブロック{n}個",
    "{shown} and {n} more kinds": "{shown}、ほか{n}種類",
    "{names}: {what}.": "{names}：{what}。",
    "A: {a}. B: {b}.": "A：{a}。B：{b}。",
    "No tensor was compared.": "比較したテンソルはない。",
    "All {tensors} agree: {parts}.": "{tensors}すべてが一致する：{parts}。",
    "{n} are equal": "{n}個は同一",
    "{n} differ by no more than their types explain": "{n}個の差は型で説明できる範囲内",
    "{n} by channel scales that cancel": "{n}個の差は打ち消し合うチャネルスケールによるもの",
    "{n} are norm weights and biases that the file says were re-tuned": "{n}個は再調整したとファイルに記録のある正規化の重みとバイアス",
    "rescaled": "再スケール",
    "re-tuned": "再調整",
    "lowest predicted KL": "予測KL最小",
    "{n} of {tensors} differ by more than their types explain.": "{tensors}のうち{n}個の差が型で説明できる大きさを超える。",
    "Another model altogether: the values of all {matrices} are unrelated.": "まったく別のモデルである：{matrices}のすべてで値に関連がない。",
    "Another model altogether: no tensor has the same shape in both files.": "まったく別のモデルである：両方のファイルで形状が同じテンソルはない。",
    "the shape is {a} in A and {b} in B": "形状がAでは{a}、Bでは{b}",
    "some blocks are corrupt in one of the files": "一方のファイルの一部のブロックが破損している",
    "{n} of {blocks} corrupt; the worst, {size} elements from [{row}, {column}], has {times} times the error of its types": (
        "{blocks}中{n}個が破損。最悪のブロックは[{row}, {column}]からの{size}要素で、誤差は型によるものの{times}倍"
    ),
    "{n} of {blocks} corrupt; the worst, {size} elements from [{row}, {column}], is zero in one file only": (
        "{blocks}中{n}個が破損。最悪のブロックは[{row}, {column}]からの{size}要素で、一方のファイルでのみ0"
    ),
    "B holds {what}": "Bの内容は、{what}",
    "B holds {what}, which leaves more than the types explain": "Bの内容は、{what}（それでも型で説明できる以上の差が残る）",
    "B holds {what}, which leaves more than the types explain ({left})": "Bの内容は、{what}（それでも型で説明できる以上の差{left}が残る）",
    "the values are unrelated (another model, or an order that is not among the known ones)": "値に関連がない（別のモデルか、既知でない並び）",
    "like rounding or further training (all blocks, strongly correlated): one file went through a coarser type, or was trained on": (
        "丸めまたは追加学習のような差（全ブロック、強い相関）：一方のファイルはより粗い型を経由したか、追加学習されている"
    ),
    "none of the known causes": "既知の原因のどれでもない",
    "{tensors} within what the types explain not shown; `--all` shows them.": "型で説明できる範囲内の{tensors}は省略。`--all`で表示する。",
    "{path} says that it was corrected for the outputs of its products: its values may be {times} times as far as its types explain.": (
        "{path}には、積の出力に対して補正したとの記録がある：値の差は型で説明できる大きさの{times}倍まで許容する。"
    ),
    "Not read by the forward, not compared, in {which}: {names}.": "{which}のうち順伝播で使われず、比較していないもの：{names}。",
    "values where A has only zeros": "Aが0だけのところにある値",
    "only zeros": "0のみ",
    "A's matrix transposed": "Aの行列を転置したもの",
    "the values of A's transposed matrix in this matrix's shape (reinterpreted)": "Aの転置行列の値をこの行列の形状に並べたもの（再解釈）",
    "A's values read in the shape of the transposed matrix, then transposed": "Aの値を転置行列の形状で読み、転置したもの",
    "the rows of each head interleaved, half-split in A: the q/k row permutation of a conversion is missing in one file or done once too often in the other": (
        "各ヘッドの行が交互に並んだもの（Aでは前後半）：変換時のq/kの行の並べ替えが一方のファイルにないか、他方で余分に行われている"
    ),
    "the rows of each head half-split, interleaved in A: the q/k row permutation of a conversion is missing in one file or done once too often in the other": (
        "各ヘッドの行が前後半に並んだもの（Aでは交互）：変換時のq/kの行の並べ替えが一方のファイルにないか、他方で余分に行われている"
    ),
    "A's values plus 1 (one side stores norm weights as w − 1, the other as w)": "Aの値に1を加えたもの（一方は正規化の重みをw − 1、他方はwとして保存している）",
    "A's values minus 1 (one side stores norm weights as w − 1, the other as w)": "Aの値から1を引いたもの（一方は正規化の重みをw − 1、他方はwとして保存している）",
    "A's values times {factor}": "Aの値を{factor}倍したもの",
    "A's values plus {shift}": "Aの値に{shift}を加えたもの",
    "the elements of each block of {size} in another order, the same in every block": "{size}要素の各ブロックの要素を、全ブロック共通の別の順序に並べたもの",
    "{order} ({name})": "{order}（{name}）",
    "low and high nibbles as neighbours: the order of Q4_0, Q4_1, Q5_0 or Q5_1 was misread": "下位ニブルと上位ニブルが隣り合う：Q4_0、Q4_1、Q5_0またはQ5_1の順序の読み誤り",
    "low and high nibbles as neighbours: the order of Q4_K or Q5_K was misread": "下位ニブルと上位ニブルが隣り合う：Q4_KまたはQ5_Kの順序の読み誤り",
    "the elements l, l+32, l+64, l+96 as neighbours: the order of Q6_K, Q3_K or Q2_K was misread": "要素l, l+32, l+64, l+96が隣り合う：Q6_K、Q3_KまたはQ2_Kの順序の読み誤り",
    "the same values in another order": "同じ値を別の順序に並べたもの",
    "A's rows in another order": "Aの行を別の順序に並べたもの",
    "A's columns in another order": "Aの列を別の順序に並べたもの",
    "what A has as {name}": "Aでの{name}の内容",
}
