"""Japanese: the parts together.

である調, full-width punctuation (、。：；（）) in sentences, names and numbers as they are, 倍 for × in sentences.
Words that all parts share:

    original 元モデル       variant バリアント      layer 層                 tap タップ            trace トレース
    evidence 証拠           floor ノイズフロア      exact 厳密計算           fault 誤り            operation 演算
    reference 参照(実装)    probe プローブ          replay 再計算            residual 残差         massive activation 巨大活性値
    mean 平均               growth 成長率           generated 生成トークン   rank 順位             KL divergence KLダイバージェンス
"""

from __future__ import annotations

from collections.abc import Mapping

from quantscope.strings import parts

STRINGS: Mapping[str, str] = {key: text for part in parts("ja").values() for key, text in part.items()}
