"""The catalogue of faults and of mistakes in tokenizing, in Japanese: each completes 「エンジンは…」."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    # weights
    "every one of them": "すべて",
    "reads the matrix with its axes in the wrong order ({place})": "行列の軸の順序を取り違えて読む（{place}）",
    "takes the transposed matrix's memory for the matrix ({place})": "転置行列のメモリをその行列として読む（{place}）",
    "reads a column of the embedding instead of a row": "埋め込みの行ではなく列を読む",
    "exchanges gate and up: silu(up) · gate": "gateとupを取り違える：silu(up) · gate",
    "loads ffn_gate for ffn_up and the reverse": "ffn_gateとffn_upを入れ替えて読み込む",
    "leaves out the bias ({place})": "バイアスを加えない（{place}）",
    "takes low and high nibbles of a block of 32 as neighbours": "32要素のブロックの下位ニブルと上位ニブルを隣り合う要素として扱う",
    "takes low and high nibbles of each 64 elements of a K-block as neighbours": "Kブロックの64要素ごとに下位ニブルと上位ニブルを隣り合う要素として扱う",
    "unpacks the 6-bit scales and mins of the sub-blocks 4 to 7 of Q4_K and Q5_K wrongly": "Q4_KとQ5_Kのサブブロック4〜7の6ビットのスケールと最小値を誤って展開する",
    "takes the elements of Q6_K in sequence instead of l, l+32, l+64, l+96": "Q6_Kの要素をl, l+32, l+64, l+96ではなく連続して並べる",
    "does not subtract 32 from Q6_K codes": "Q6_Kの符号から32を引かない",
    "reads the float16 scale of a block as bfloat16": "ブロックのfloat16のスケールをbfloat16として読む",
    "does not subtract the min of a block": "ブロックの最小値を引かない",
    "ignores the fifth bit of Q5 codes": "Q5の符号の5ビット目を無視する",
    "does not subtract 8 from Q4_0 codes (16 from Q5_0)": "Q4_0の符号から8（Q5_0では16）を引かない",
    # norms
    "adds {place} to the mean square in its norms, another eps than the file's": "正規化で二乗平均に{place}を加える（ファイルのepsと異なる）",
    "does not multiply with the norm's weight ({place})": "正規化の重みを掛けない（{place}）",
    "multiplies with the norm's weight twice ({place})": "正規化の重みを2回掛ける（{place}）",
    "multiplies with 1 + the norm's weight ({place})": "1 + 正規化の重みを掛ける（{place}）",
    "subtracts the mean: LayerNorm for RMSNorm ({place})": "平均を引く：RMSNormの代わりにLayerNormを使う（{place}）",
    "does not norm q and k": "qとkを正規化しない",
    "leaves out the norm ({place})": "正規化を省く（{place}）",
    # rotation
    "pairs channels the other way (interleaved for half-split or the reverse)": "チャネルの組み方が逆である（交互と前後半の取り違え）",
    "rotates with the base {place}": "底{place}で回転する",
    "counts positions from another start on q and k ({place})": "qとkの位置を別の値から数え始める（{place}）",
    "counts the positions of q otherwise than those of k ({place})": "qの位置をkの位置と異なる数え方で数える（{place}）",
    "counts the positions of k otherwise than those of q ({place})": "kの位置をqの位置と異なる数え方で数える（{place}）",
    "does not rotate q and k": "qとkを回転しない",
    "rotates every position as position 0": "すべての位置を位置0として回転する",
    "does not rotate k": "kを回転しない",
    "does not rotate q": "qを回転しない",
    "rotates the other way": "逆向きに回転する",
    "does not divide the frequencies by rope_freqs.weight": "周波数をrope_freqs.weightで割らない",
    "does not scale the positions for a longer context": "長い文脈のための位置のスケーリングを行わない",
    # attention
    "lets every position see the whole batch": "すべての位置からバッチ全体が見える",
    "lets a position see the one after it": "各位置から1つ後の位置が見える",
    "does not let a position see itself": "各位置から自分自身が見えない",
    "does not scale q·k": "q·kをスケーリングしない",
    "scales q·k by 1/√n_embd": "q·kを1/√n_embd倍する",
    "scales q·k by 1/head_dim": "q·kを1/head_dim倍する",
    "gives query head h the key/value head h mod K instead of h // (H/K)": "クエリヘッドhにキー・バリューヘッドh // (H/K)ではなくh mod Kを割り当てる",
    "takes a head for two of half the size": "1つのヘッドを半分の大きさの2つのヘッドとして扱う",
    "takes the softmax over the queries": "softmaxをクエリの方向に取る",
    "takes the softmax over the heads": "softmaxをヘッドの方向に取る",
    "does not store keys and values of decoded tokens in its cache": "デコードしたトークンのキーとバリューをキャッシュに保存しない",
    "does not see the newest cell of its cache": "キャッシュの最新のセルを参照しない",
    # feed-forward
    "has GELU for SiLU": "SiLUの代わりにGELUを使う",
    "has GELU (tanh form) for SiLU": "SiLUの代わりにGELU（tanh近似）を使う",
    "has ReLU for SiLU": "SiLUの代わりにReLUを使う",
    "has no activation: gate · up": "活性化関数を使わない：gate · up",
    "has the logistic function for SiLU": "SiLUの代わりにロジスティック関数を使う",
    "stores the feed-forward's activations in float16, which overflows": "フィードフォワードの活性値をfloat16で保持し、オーバーフローする",
    # residual stream, head, ids
    "does not add the stream to the attention's output": "注意機構の出力に残差ストリームを加えない",
    "does not add the stream to the feed-forward's output": "フィードフォワードの出力に残差ストリームを加えない",
    "does not run layer {place}": "層{place}を実行しない",
    "runs layer {place} twice": "層{place}を2回実行する",
    "clips the residual stream at ±{place}": "残差ストリームを±{place}で切り詰める",
    "indexes the output matrix as h·V + v instead of v·H + h": "出力行列の添字をv·H + hではなくh·V + vとする",
    "has no output matrix: the hidden state is given as logits": "出力行列を使わず、隠れ状態をそのままlogitとする",
    "has not loaded the output matrix: all logits are 0": "出力行列を読み込んでおらず、すべてのlogitが0になる",
    "ran the ids without the first, BOS": "先頭のBOSを除いたIDを実行した",
    # what tells them apart
    "whole tensors of the operations they touch, in the first layer that differs, on eight different tokens": (
        "相違のある最初の層で、関係する演算のテンソル全体を、異なる8トークンについて記録したもの"
    ),
    "nothing: a rotation by 0 is no rotation; look at the positions that the engine passes": "区別する手段はない。角度0の回転は回転しないのと同じである。エンジンが渡している位置を調べること",
    "the whole ffn_gate, ffn_up and ffn_swiglu of one layer in float32 (they are 4e-8 apart)": "1つの層のffn_gate、ffn_up、ffn_swiglu全体のfloat32での記録（両者の差は4e-8）",
    "nothing: they are the same reading of output.weight": "区別する手段はない。どちらもoutput.weightの同じ読み方である",
    "Qcur and Kcur of layer 0: only one of them is wrong": "層0のQcurとKcur（誤っているのは一方だけである）",
    "a norm whose weights are not all alike": "重みが一様でない正規化",
    "the same text in one batch: a cache fault is gone there": "同じテキストを1バッチで実行した結果（キャッシュの誤りなら現れない）",
}
