"""The tokenizer verdict in Japanese: each rule completes 「エンジンは…」."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {
    "{n} token ids": "{n}個のトークンID",
    "{n} more ids": "さらに{n}個のID",
    "The engine's {ids} are those of the file's own vocabulary for this text.": "エンジンの{ids}は、このテキストに対するファイル自身の語彙のものと一致する。",
    "The engine's {ids} are the expected ones.": "エンジンの{ids}は期待どおりである。",
    "The engine's {ids} are those of the file's own vocabulary for the text they spell; whether it is the text that was meant, only the text shows.": (
        "エンジンの{ids}は、それが表すテキストに対するファイル自身の語彙のものと一致する。意図したテキストかどうかは、そのテキストがなければわからない。"
    ),
    "The engine's {ids} spell no text that can be tokenized again: nothing shows whether they are right.": (
        "エンジンの{ids}が表すものは再びトークン化できるテキストではない。正しいかどうかを示すものはない。"
    ),
    "The ids part at position {position}: expected {expected}, found {found}: {why}.": "IDは位置{position}で分かれる。期待値は{expected}、実際は{found}である：{why}。",
    "The ids part at position {position}: expected {expected}, found {found}: {why}, if the text is the one they spell.": (
        "IDは位置{position}で分かれる。期待値は{expected}、実際は{found}である：{why}（IDが表すテキストが意図したものである場合）。"
    ),
    "no more ids": "終端",
    "At position {position} {what}.": "位置{position}：{what}。",
    "id {id} is no token of this vocabulary (0 to {last}), another model's was used": "ID {id}はこの語彙（0〜{last}）のトークンではなく、別のモデルの語彙が使われている",
    "the engine {faults}": "エンジンは{faults}",
    "{faults} (gives exactly these ids)": "{faults}（これでちょうどこのIDになる）",
    "probably {faults} (nearer to these ids, but does not give exactly them)": "おそらく{faults}（このIDに近づくが、完全には一致しない）",
    "none of the known mistakes gives these ids": "既知の誤りのどれもこのIDにはならない",
    "no rule was tried, as the vocabulary or the text is not known": "語彙またはテキストが不明なため、どの規則も試していない",
    "the engine ran only the first {n} of {tokens}": "エンジンは{tokens}のうち最初の{n}個だけを実行した",
    "the expected ids are all there, and {more} follow: generated tokens, or more text": "期待されるIDはすべてあり、{more}が続く：生成されたトークンか、追加のテキストである",
    "the ids of the text are there, with {before} before and {after} after them, a chat template or another prompt": (
        "テキストのIDはあるが、その前に{before}、後に{after}がある：チャットテンプレートか別のプロンプトである"
    ),
    "strips white space from both ends of the text": "テキストの両端の空白を取り除く",
    "strips white space from the start of the text": "テキストの先頭の空白を取り除く",
    "strips white space from the end of the text": "テキストの末尾の空白を取り除く",
    "adds a newline to the text": "テキストに改行を付け加える",
    "replaces newlines by spaces": "改行を空白に置き換える",
    "drops newlines": "改行を削除する",
    "turns newlines into carriage return and newline": "改行をCRLFに変える",
    'passes a newline on as the two characters "\\n"': '改行を2文字の"\\n"として渡す',
    "makes one space of several": "連続する空白を1つにまとめる",
    "drops spaces": "空白を削除する",
    "turns the text into lower case": "テキストを小文字にする",
    "reads the UTF-8 bytes of the text as Latin-1": "テキストのUTF-8のバイト列をLatin-1として読む",
    "normalizes the text ({what})": "テキストを正規化する（{what}）",
    "leaves out the space that belongs before a text (add_space_prefix)": "テキストの前に付くはずの空白（add_space_prefix）を省く",
    "puts the space prefix before the whole text only, not after special tokens": "空白を全体の先頭にだけ付け、特殊トークンの後には付けない",
    "puts one space too many before the text": "テキストの前に空白を1つ余分に付ける",
    "tokenizes special tokens that are spelled out in the text as plain text": "テキスト中に書かれた特殊トークンを通常のテキストとしてトークン化する",
    "reads special tokens that are spelled out in the text as those tokens": "テキスト中に書かれた特殊トークンをそのトークンとして読む",
    "puts a chat template around the text ({what})": "テキストをチャットテンプレートで囲む（{what}）",
    "puts a chat template around the text ({what}), its special tokens as plain text": "テキストをチャットテンプレートで囲み（{what}）、その特殊トークンを通常のテキストとして扱う",
    "does not merge: one token a character": "マージせず、1文字を1トークンとする",
    "makes a byte token of every byte": "すべてのバイトをバイトトークンにする",
    "makes byte tokens of characters beyond ASCII, although they have tokens": "ASCII以外の文字を、トークンがあるのにバイトトークンにする",
    "gives the unknown token where bytes are to be written (no byte fallback)": "バイトで表すべきところに未知トークンを出す（バイトフォールバックがない）",
    "takes the longest token that fits instead of merging by rank or score": "順位やスコアによるマージの代わりに、最長一致のトークンを選ぶ",
    "takes the longest token that fits within a word": "単語の中で最長一致のトークンを選ぶ",
    "makes a token of its own of every space": "空白を1つずつ独立したトークンにする",
    "does not cut the text into words before it merges (no pre-tokenizer)": "マージの前にテキストを単語に分割しない（pre-tokenizerがない）",
    "cuts the text into words as {what} does (tokenizer.ggml.pre)": "{what}の方法でテキストを単語に分割する（tokenizer.ggml.pre）",
    "leaves out BOS": "BOSを付けない",
    "adds BOS although the vocabulary does not ask for it": "語彙が求めていないBOSを付ける",
    "adds BOS twice": "BOSを2回付ける",
    "leaves out EOS": "EOSを付けない",
    "appends EOS": "末尾にEOSを付ける",
}
