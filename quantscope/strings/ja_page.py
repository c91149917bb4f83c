"""The HTML pages in Japanese."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    # the frame
    "Skip to the answer": "結論へ移動",
    "Contents": "目次",
    "Variants: press one to hide or show it everywhere": "バリアント：押すと全体で表示・非表示が切り替わる",
    "Show all": "すべて表示",
    "Variant": "バリアント",
    "Shown": "表示対象",
    "Numbers of this chart": "この図の数値",
    "The numbers are in the table below.": "数値は下の表にある。",
    "Table": "表",
    "Copy as TSV": "TSVとしてコピー",
    "Copied": "コピーした",
    "Dark": "暗色",
    "Light": "明色",
    "The charts need JavaScript; the tables do not.": "図の表示にはJavaScriptが必要である。表には必要ない。",
    "Made by quantscope {version}. This page needs nothing else: it can be kept, sent and opened offline.": (
        "quantscope {version}が作成した。このページは単独で完結しており、保存も送付もオフラインでの閲覧もできる。"
    ),
    "The first {shown} of {variants} are in this figure; study.json has all.": (
        "この図には{variants}のうち最初の{shown}個を示す。すべてはstudy.jsonにある。"
    ),
    # a study
    "RMS of the residual stream": "残差ストリームのRMS",
    "Tokens that go through other experts than in the original": "元のモデルと異なるエキスパートを通るトークン",
    "tokens [%]": "トークン［%］",
    "Mean of the residual stream": "残差ストリームの平均",
    "RMS of the {activation} output": "{activation}出力のRMS",
    "Mean of the {activation} output": "{activation}出力の平均",
    "output RMS": "出力RMS",
    "Error of each layer's output against the original": "各層の出力の元モデルに対する誤差",
    "Error of every operation in every layer": "各層・各演算の誤差",
    "Largest activation of the residual stream": "残差ストリームの最大の活性値",
    "{name}: what the quantization does, and what the engine adds": "{name}：量子化の影響と、エンジンが加える影響",
    "KL divergence over the positions: from the least to the most changed": "位置ごとのKLダイバージェンス：変化の小さい位置から大きい位置へ",
    "How many positions are changed how much": "変化の大きさごとの位置の数",
    "percentile": "百分位",
    "positions": "位置の数",
    "The most probable next tokens": "次トークンの上位候補",
    "probability {p}, rank {rank}": "確率{p}、{rank}位",
    "Size against KL divergence: lower left is better": "サイズとKLダイバージェンス：左下ほど良い",
    "file size [MB]": "ファイルサイズ [MB]",
    "{bpw} bits per weight": "重みあたり{bpw}ビット",
    "The text itself": "テキスト本文",
    (
        "{shown} of {all} positions. The stronger the colour of a token, the more the prediction of what follows it differs from the "
        "original's; point at a token, tap it or go to it with the arrow keys to see both."
    ): (
        "{all}位置のうち{shown}位置を示す。色の濃いトークンほど、その次の予測が元モデルから離れている。"
        "トークンを指すか、タップするか、矢印キーで移動すると、両方の予測が見える。"
    ),
    "What really follows: {token}": "実際に続くトークン：{token}",
    "KL divergence here: {kl} nats": "ここでのKLダイバージェンス：{kl} nats",
    # a diagnosis
    "Evidence": "証拠",
    "Causes": "原因",
    "Tap by tap": "タップごとの比較",
    "Three ways": "三分割",
    "Error of every tap, and the floor below which it means nothing": "各タップの誤差と、それ以下では意味をもたない下限",
    "Error as a multiple of its floor: above 1 it is no rounding": "下限に対する誤差の倍率：1を超えれば丸めでは説明できない",
    "NMSE / floor": "NMSE / 下限",
    "Quantization and engine through the layers": "層ごとの量子化とエンジンの影響",
    # sensitivities and recipes
    "Layer by layer, role by role": "層ごと・役割ごと",
    "Sums": "合計",
    "type": "型",
    "Predicted KL divergence of one matrix alone in a type": "行列を1つだけその型にしたときの予測KLダイバージェンス",
    "What each role costs in each type": "役割ごと・型ごとの代償",
    "Size against KL divergence": "サイズとKLダイバージェンス",
    "Predicted: below the line is nothing": "予測値：線より下には何もない",
    "Candidates": "候補",
    "Measured and predicted KL divergence": "実測と予測のKLダイバージェンス",
    "Types of the chosen recipe": "選ばれたレシピの型",
    "Bits per weight of every matrix": "各行列の重みあたりのビット数",
    "quantscope recipe for {model}": "{model}のquantscopeレシピ",
}
