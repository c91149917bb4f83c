"""The reference forward.

Axis letters, used in every shape comment: B batch, T tokens, E n_embd, H heads, K kv heads, D head_dim, F n_ff, V vocab.
"""
