"""Notes on what a reader must know, in Japanese."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    # of the files of a study
    "No original: no file is the only unquantized one, so errors and KL divergence are missing. Name it with `--ref`.": (
        "元モデルなし：量子化されていない唯一のファイルが決まらないため、誤差とKLダイバージェンスは計算していない。`--ref`で指定する。"
    ),
    (
        "{path} is already quantized: the variants are quantized from its values, so that both errors add up. Use an F16, BF16 or F32 file "
        "for figures that hold for published quantizations."
    ): (
        "{path}はすでに量子化されている。バリアントはその値から量子化したため、両方の誤差が重なる。"
        "公開されている量子化モデルに当てはまる数値を得るには、F16、BF16またはF32のファイルを使う。"
    ),
    "{path}: {n} tensors are not used by the reference forward: {names}.": "{path}：{n}個のテンソルは参照実装で使われない：{names}。",
    "{path}: metadata keys not known to the reference forward: {names}.": "{path}：参照実装の知らないメタデータのキー：{names}。",
    "No token reaches some of the experts ({some}): nothing is known of what quantization does to them. Study a longer text.": (
        "どのトークンも届かないエキスパートがある（{some}）。それらへの量子化の影響は分からない。より長いテキストで調べること。"
    ),
    "No token reaches some of the experts ({some}): their matrices were not read, so nothing is said of them. Trace a longer text.": (
        "どのトークンも届かないエキスパートがある（{some}）。その行列は読まれず、何も言えない。より長いテキストでトレースすること。"
    ),
    (
        "{path} names no pre-tokenizer (tokenizer.ggml.pre); 'default' is used, as llama.cpp does, and words are probably cut otherwise "
        "than in training: convert the model again with a current converter."
    ): (
        "{path}にはpre-tokenizerの指定（tokenizer.ggml.pre）がない。llama.cppと同じく'default'を使うが、"
        "単語の区切りはおそらく学習時と異なる。現行の変換プログラムでモデルを変換し直すこと。"
    ),
    (
        "{path} adds no BOS token although {config} has add_bos_token: true; it is followed, as Transformers 5 does, and the GGUF file of "
        "this model may add one."
    ): (
        "{config}にadd_bos_token: trueとあるが、{path}はBOSトークンを付けない。Transformers 5と同じくこれに従うが、"
        "このモデルのGGUFファイルでは付くことがある。"
    ),
}
