"""Golden packs: the expected values of a model as plain files, for the tests of an engine in any language.

    make(model)  →  files by name  →  write(files, folder)            check(load(folder), trace)  →  rows, tap by tap

    README.md         how to use the rest, in which order, and what a failure means
    manifest.json     everything below as data: shapes, positions, tolerances, ids, top logits
    index.txt         one line a float file, for checkers without a JSON parser;  check.c is one
    probes.txt        NAME: token ids;  PROBE/TAP.f32, PROBE/top20.txt
    tokenizer/        texts as files, expected.txt with their ids
    tensors/          the first dequantized rows of every tensor
    fingerprints.txt  one line a tap (docs/fingerprints.md), also of the taps whose values were left out to keep the pack small

Float files are raw little-endian float32 in row-major order, nothing else.
"""

from __future__ import annotations

KEY, VERSION = "quantscope.golden", 1
MANIFEST, INDEX, README, PRINTS, CHECKER = "manifest.json", "index.txt", "README.md", "fingerprints.txt", "check.c"
