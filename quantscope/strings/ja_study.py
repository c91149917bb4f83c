"""The study in Japanese: its tables and headings.  Words and their order follow the analysis that the tables are modelled on."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    # counts, lists, numbers
    "{n} layers": "{n}層",
    "{n} tokens": "{n}トークン",
    "{n} tensors": "{n}テンソル",
    "{n} elements": "{n}要素",
    "{n} positions": "{n}位置",
    "{n} chunks": "{n}チャンク",
    "{n} batches": "{n}バッチ",
    "{n} variants": "{n}個のバリアント",
    "{n} other variants": "他の{n}個のバリアント",
    "{n} billion": "{n}B",
    "{n} million": "{n}M",
    "{n} bytes": "{n}バイト",
    "{n}×": "{n}倍",
    "{low} to {high}": "{low}〜{high}",
    "{first} and {last}": "{first}、{last}",
    "{shown} and {n} more": "{shown}、ほか{n}件",
    "and {n} more": "ほか{n}件",
    "{value} ({name})": "{value}（{name}）",
    "{name} ({value})": "{name}（{value}）",
    "{name}: {states}": "{name}：{states}",
    ", ": "、",
    "; ": "；",
    " ": "",
    # headings
    "quantscope study of {name}": "{name}の量子化分析（quantscope）",
    "several variants": "複数のバリアント",
    "Findings": "重要な発見",
    "Notes": "注記",
    "Provenance": "実行環境と出所",
    "Generated token": "生成トークンの比較",
    "Layer by layer": "層ごとの比較",
    "{activation}": "{activation}出力の比較",
    "Error against the original": "元モデルに対する誤差",
    "Logits": "Logitの比較",
    "Which is better": "どちらが優れているか",
    "Operation by operation": "演算ごとの比較",
    "Outliers": "外れ値",
    "Routing": "ルーティング",
    "Tokens that go through other experts": "異なるエキスパートを通るトークン",
    "Experts that no token reaches": "どのトークンも届かないエキスパート",
    "Engines": "エンジン",
    "Size": "サイズ",
    # what was studied
    "Model {name}: {arch}, {layers} × {n_embd} channels, vocabulary {n_vocab}, {n_params} parameters": (
        "モデル{name}：{arch}、{layers}×{n_embd}チャネル、語彙数{n_vocab}、パラメータ数{n_params}"
    ),
    "Prompt {text}: {tokens} ({ids}); layer statistics over {where}": (
        "プロンプト{text}：{tokens}（{ids}）。層の統計量は{where}にわたって計算"
    ),
    "Prompt: {tokens} ({ids}); layer statistics over {where}": "プロンプト：{tokens}（{ids}）。層の統計量は{where}にわたって計算",
    "all positions": "全位置",
    "the last position": "最後の位置",
    "Text {path}: {n_tokens} tokens, {chunks}, {positions} scored: {where}": (
        "テキスト{path}：{n_tokens}トークン、{chunks}、評価対象は{positions}（{where}）"
    ),
    "{chunks} of {n_ctx}": "{n_ctx}トークンの{chunks}",
    "{chunks} of {n_ctx} (of {given}: stopped early, every mean KL being known well enough)": (
        "{n_ctx}トークンの{chunks}（{given}チャンク中。すべての平均KLが十分な精度で求まったため打ち切り）"
    ),
    "the second half of each chunk, as in llama-perplexity": "llama-perplexityと同じく各チャンクの後半",
    "all but the last of each chunk": "各チャンクの最後を除く全位置",
    "Plan: {plan}": "実行計画：{plan}",
    (
        "{batches} of {chunks} of {n_ctx} tokens, {slice} at a time through a layer, logits of {positions} × {ids} ids at a time; about "
        "{planned} of memory planned (bound: {bound})"
    ): (
        "{n_ctx}トークンの{chunks}を1バッチとし、計{batches}。1層を一度に{slice}ずつ、logitを一度に{positions}×{ids} IDずつ計算。"
        "メモリ使用量の見込みは約{planned}（上限{bound}）"
    ),
    (
        "Numerical floor: float32 rounding alone makes a KL divergence of {mean} nats on average, {most} at most ({positions}, against "
        "float64); nothing below means anything"
    ): (
        "数値誤差のノイズフロア：float32の丸めだけで生じるKLダイバージェンスは平均{mean} nats、最大{most} nats（{positions}、float64との比較）。"
        "これを下回る値に意味はない"
    ),
    (
        "Base {path} (SHA-256 {sha256}…): log-probabilities of {chunks} in steps of up to {step} nats; the KL divergence of one position "
        "means nothing below half of that"
    ): (
        "基準ファイル{path}（SHA-256 {sha256}…）：{chunks}分の対数確率、刻みは最大{step} nats。"
        "1位置のKLダイバージェンスは、その半分を下回ると意味をもたない"
    ),
    # tokens
    "variant": "バリアント",
    "token": "生成トークン",
    "id": "トークンID",
    "logit": "Logit",
    "rank": "Logit順位",
    "rank in original": "元モデルでの順位",
    "probability": "確率",
    "same token": "同じトークン",
    "yes": "はい",
    "{mark} no": "{mark} いいえ",
    "greedy continuation": "貪欲法による続き",
    (
        "The token with the largest logit after the prompt. Rank 1 is the largest; a rank in the original above 1 means that the "
        "original would have said something else."
    ): (
        "プロンプトの次に来る、logitが最大のトークン。順位1が最大である。元モデルでの順位が1より下なら、"
        "元モデルは別のトークンを生成していたことになる。"
    ),
    # layers
    "layer": "層",
    "{name} (original)": "{name} (元モデル)",
    "Input RMS": "入力RMS",
    "Output RMS and its growth": "出力RMSとRMS成長率",
    "Mean of the output": "出力の平均",
    "{activation} RMS": "{activation} RMS",
    "{activation} mean": "{activation}平均",
    "NMSE and SQNR [dB]": "NMSEとSQNR [dB]",
    "Cosine": "コサイン類似度",
    (
        "RMS = sqrt(mean(x²)) and mean over all channels of the residual stream. Input of a layer = output of the one before it; "
        "growth = output RMS against that of the first layer."
    ): (
        "残差ストリームの全チャネルにわたるRMS = sqrt(mean(x²))と平均。層の入力は直前の層の出力であり、"
        "成長率は最初の層の出力RMSに対する比である。"
    ),
    "RMS and mean of {formula}, the widest signal of a layer.": "層の中で最も幅の広い信号{formula}のRMSと平均。",
    "Share of the tokens that go through other experts than in the original; which of the chosen comes first does not count. "
    "llama-quantize leaves the router as it is: it chooses otherwise where its input has changed. The errors of the single "
    "experts' operations are over the experts that both chose.": (
        "元のモデルと異なるエキスパートを通るトークンの割合。選ばれたエキスパートの順序は問わない。"
        "llama-quantizeはルーターを量子化しない。選択が変わるのは、その入力が変わった所である。"
        "個々のエキスパートの演算の誤差は、両方が選んだエキスパートについてのものである。"
    ),
    (
        "NMSE = Σ(original − variant)² / Σ original² of the layer output; SQNR = −10·log10(NMSE), higher is better; cosine 1 = the same "
        "direction."
    ): (
        "層の出力についてNMSE = Σ(元モデル − バリアント)² / Σ元モデル²。SQNR = −10·log10(NMSE)は大きいほど良い。"
        "コサイン類似度が1なら向きが同じである。"
    ),
    "{mark} {name}, layer {layer}: |mean|/RMS is {ratio}, {times} the value {others} of {variants}": (
        "{mark} {name}、層{layer}：|平均|/RMSは{ratio}で、{variants}の値{others}の{times}"
    ),
    "{mark} {name}, layer {layer}: |mean|/RMS is {ratio}, {times} the median {others} of {variants}": (
        "{mark} {name}、層{layer}：|平均|/RMSは{ratio}で、{variants}の中央値{others}の{times}"
    ),
    "{shown} of {n} layers shown; all of them are in {full}": "全{n}層のうち{shown}層を表示。すべての層は{full}にある",
    "{mark} {n} more flagged cells: see {full}": "{mark} ほかに印の付いたセルが{n}個ある。{full}を参照",
    # logits
    "Over {n} positions, ± standard error. KL divergence of the next-token distribution from the original's: 0 = the same.": (
        "{n}位置での値、±は標準誤差。次トークンの分布の、元モデルの分布からのKLダイバージェンス。0なら同一である。"
    ),
    "KL [nats]": "KL [nats]",
    "same top token": "最上位トークンの一致",
    "RMS Δp": "RMS Δp",
    "perplexity": "パープレキシティ",
    "change": "変化",
    "KL divergence [nats]: 95 % interval of the mean, and percentiles over the positions": (
        "KLダイバージェンス [nats]：平均の95 %信頼区間と、全位置にわたるパーセンタイル"
    ),
    "Δp, the change of the next token's probability: mean, and percentiles over the positions": (
        "Δp（次トークンの確率の変化）：平均と、全位置にわたるパーセンタイル"
    ),
    "Perplexity against the original's, paired by position": "元モデルに対するパープレキシティ（位置ごとに対応づけて比較）",
    "mean": "平均",
    "median": "中央値",
    "smallest": "最小",
    "largest": "最大",
    "1 %": "1 %",
    "10 %": "10 %",
    "90 %": "90 %",
    "99 %": "99 %",
    "99.9 %": "99.9 %",
    "ln ratio": "比の対数",
    "ratio": "比",
    "difference": "差",
    "correlation of ln PPL": "ln PPLの相関",
    (
        "Every two neighbours in the order of KL on the same positions; the interval is of the mean difference (Student's t over {units}). "
        "study.json has all pairs."
    ): (
        "KLの順で隣り合う2つを同じ位置どうしで比較する。区間は差の平均の信頼区間（{units}にわたるStudentのt）。"
        "すべての組はstudy.jsonにある。"
    ),
    "closer": "近いほう",
    "farther": "遠いほう",
    "by [nats]": "差 [nats]",
    "95 % interval": "95 %信頼区間",
    "settled": "有意",
    "not told apart": "区別できない",
    # operations
    "operation": "演算",
    (
        "The lowest SQNR [dB] of each operation's result over the layers, and the layer; in the order of the graph. study.json has RMS, "
        "mean, extremes, NMSE, cosine and their spread over the chunks for every layer."
    ): (
        "各演算の結果のSQNR [dB]の全層での最小値と、その層。計算グラフの順に並べる。全層のRMS、平均、最大・最小、NMSE、コサイン類似度と、"
        "それらのチャンク間のばらつきはstudy.jsonにある。"
    ),
    (
        "Residual stream of {name}. An outlier channel has over 6 times the median channel's RMS; a massive activation is over 100 and over "
        "1,000 times the median |x|."
    ): (
        "{name}の残差ストリーム。外れ値チャネルとはRMSがチャネルの中央値の6倍を超えるもの、巨大活性値とは100を超え、"
        "かつ|x|の中央値の1,000倍を超えるものである。"
    ),
    "largest |x|": "最大の|x|",
    "at token, channel": "トークン、チャネル",
    "outlier channels": "外れ値チャネル",
    "massive": "巨大活性値",
    "RMS ± over chunks": "RMS（±はチャンク間）",
    # engines
    (
        "NMSE, three ways. Quantization: the original → this file, both exact. An engine's column: this file, exact → the engine on it. "
        "Predicted: what its arithmetic (activations rounded to 8 bits, a 16-bit cache) does to exact results; where there is none, only "
        "the order of sums may differ."
    ): (
        "NMSEを3通りに分ける。「量子化」：元モデル→このファイル、いずれも厳密計算。エンジンの列：このファイルの厳密計算→そのエンジン。"
        "「予測」：エンジンの演算（活性値の8ビット丸め、16ビットのキャッシュ）が厳密な結果に及ぼす影響。"
        "予測のないエンジンでは、和を取る順序だけが異なりうる。"
    ),
    "{engine} within the floor": "{engine}はノイズフロア内",
    "{engine} {mark} differs": "{engine} {mark} 相違あり",
    "{engine}, predicted": "{engine}、予測",
    "quantization": "量子化",
    "logits": "logit",
    # sizes
    "file size": "ファイルサイズ",
    "of original": "元モデル比",
    "bits/weight": "ビット/重み",
    "tensors by type": "型ごとのテンソル数",
    # an interrupted study
    "Incomplete: interrupted before the text. Only the prompt's figures are here; the same command goes on.": (
        "未完了：テキストの処理に入る前に中断された。プロンプトの数値だけを示す。同じコマンドで続きから再開する。"
    ),
    "Incomplete: interrupted after {done} of {batches} of the text, which the figures are over; the same command goes on.": (
        "未完了：テキストの{batches}のうち{done}を終えたところで中断された。数値はその分だけに基づく。同じコマンドで続きから再開する。"
    ),
    # the page
    "Rounding in float32 makes an NMSE of {nmse} at most by itself: a line down there means nothing.": (
        "float32の丸めだけで生じるNMSEは最大{nmse}である。これより小さい値に意味はない。"
    ),
    "{engine} on {name}: every operation in every layer": "{name}上の{engine}：全層の全演算",
}
