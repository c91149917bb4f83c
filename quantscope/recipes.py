"""Which tensor gets which type: the presets of llama-quantize as data, with its fallbacks and overrides.

    assign_types("Q4_K_M", [TensorShape("blk.0.attn_v.weight", (1024, 4096)), ...], ModelFacts("llama", 32, 32, 8))

A preset is one type for most matrices plus rules for the tensors that matter more (``RULES``: the first row that applies wins).
A row no block of the chosen type fills falls back (``FALLBACK``); norms, biases and the tensors of ``KEPT`` keep their type.

Source: ``llama_tensor_get_type`` and ``tensor_allows_quantization`` in src/llama-quant.cpp of llama.cpp; checked against
its schema snapshots and against ``llama_model_quantize`` itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from quantscope.errors import UsageError
from quantscope.qtypes import QTYPES, QuantType, qtype


@dataclass(frozen=True)
class TensorShape:
    """A tensor to place: GGUF name, row-major shape, and the type it keeps when no preset applies to it (norms, biases)."""

    name: str
    shape: tuple[int, ...]
    qtype: QuantType = QTYPES["F32"]


@dataclass(frozen=True)
class ModelFacts:
    """What the presets ask about the model; of a model whose layers differ, the heads of layer 0."""

    arch: str  # GGUF's name: "llama"
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0

    @property
    def n_group(self) -> int:
        """Query heads that share one key/value head; 0 for a layer without attention."""
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        """What llama.cpp takes for a 70B model, by architecture and number of layers."""
        if self.arch in ("llama", "llama-embed"):
            return self.n_layer == 80 and self.n_head != self.n_head_kv
        return self.n_layer == {"qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}.get(self.arch)


@dataclass(frozen=True)
class Override:
    """A ``--tensor-type regex=type`` option: searched in the name, not matched whole."""

    pattern: str
    qtype: QuantType

    def matches(self, name: str) -> bool:
        return re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class Options:
    """llama-quantize's options that change the types.  Precedence: output and embedding types, overrides, the preset's rules."""

    overrides: Sequence[Override] = ()  # the first that matches wins
    output_type: QuantType | None = None  # --output-tensor-type
    embedding_type: QuantType | None = None  # --token-embedding-type
    pure: bool = False  # --pure: no rules, one type for every matrix
    leave_output: bool = False  # --leave-output-tensor
    imatrix: bool = False  # an importance matrix is at hand


class Preset(NamedTuple):
    """The type of most matrices, and the value of ``general.file_type`` (``llama_ftype``)."""

    qtype: QuantType
    file_type: int


# fmt: off
PRESETS: Mapping[str, Preset] = {name: Preset(QTYPES[base], file_type) for name, base, file_type in (
    ("F32",     "F32",      0), ("F16",     "F16",      1), ("BF16",    "BF16",    32),
    ("Q4_0",    "Q4_0",     2), ("Q4_1",    "Q4_1",     3), ("Q8_0",    "Q8_0",     7),
    ("Q5_0",    "Q5_0",     8), ("Q5_1",    "Q5_1",     9), ("Q2_K",    "Q2_K",    10),
    ("Q2_K_S",  "Q2_K",    21), ("Q3_K_S",  "Q3_K",    11), ("Q3_K_M",  "Q3_K",    12),
    ("Q3_K_L",  "Q3_K",    13), ("Q4_K_S",  "Q4_K",    14), ("Q4_K_M",  "Q4_K",    15),
    ("Q5_K_S",  "Q5_K",    16), ("Q5_K_M",  "Q5_K",    17), ("Q6_K",    "Q6_K",    18),
    ("IQ1_S",   "IQ1_S",   24), ("IQ1_M",   "IQ1_M",   31), ("IQ2_XXS", "IQ2_XXS", 19),
    ("IQ2_XS",  "IQ2_XS",  20), ("IQ2_S",   "IQ2_XS",  28), ("IQ2_M",   "IQ2_S",   29),
    ("IQ3_XXS", "IQ3_XXS", 23), ("IQ3_XS",  "IQ3_S",   22), ("IQ3_S",   "IQ3_S",   26),
    ("IQ3_M",   "IQ3_S",   27), ("IQ4_NL",  "IQ4_NL",  25), ("IQ4_XS",  "IQ4_XS",  30),
    ("TQ1_0",   "TQ1_0",   36), ("TQ2_0",   "TQ2_0",   37), ("MXFP4_MOE", "MXFP4", 38),
)}
ALIASES: Mapping[str, str] = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# Where blocks do not fill a row; a row that this does not fit either becomes F16.
FALLBACK: Mapping[str, str] = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL",
}

# The role of a tensor, by the first text its name contains; output and embeddings by their whole name.
OUTPUT, EMBEDDING, ATTN_V, ATTN_K, ATTN_Q, ATTN_OUTPUT, FFN_UP, FFN_GATE, FFN_DOWN, OTHER = (
    "output", "embedding", "attn_v", "attn_k", "attn_q", "attn_output", "ffn_up", "ffn_gate", "ffn_down", "other",
)
ROLE_BY_NAME: Mapping[str, str] = {
    "output.weight": OUTPUT, "token_embd.weight": EMBEDDING, "per_layer_token_embd.weight": EMBEDDING,
}
ROLE_BY_PART: Sequence[tuple[str, str]] = (
    ("attn_qkv.weight", ATTN_V), ("attn_kv_b.weight", ATTN_V), ("attn_v.weight", ATTN_V), ("attn_k.weight", ATTN_K),
    ("attn_q.weight", ATTN_Q), ("attn_output.weight", ATTN_OUTPUT), ("ffn_up", FFN_UP), ("ffn_gate", FFN_GATE), ("ffn_down", FFN_DOWN),
)

# Matrices that stay as they are: names that contain one of these, or equal one of the last two.
KEPT: Sequence[str] = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight",  # norms, routers
    "altup", "laurel", "per_layer_model_proj",  # Gemma 3n
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
    *(f"time_mix_{x}.weight" for x in (  # RWKV
        "first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1", "decay_w2", "lerp_fused",
    )),
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",  # vision
    "a.rvq.codebook", "mm.a.code_embd",  # audio
)
KEPT_NAMES = ("position_embd.weight", "token_types.weight")
KEPT_BY_ARCH: Mapping[str, Sequence[str]] = {"glm5-next": (
    "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate", "indexer_compressor_ape", "ssm_f_a.weight",
    "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight", "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight",
)}
Q8_BY_ARCH: Mapping[str, Sequence[str]] = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}  # not below Q8_0
# fmt: on


@dataclass(frozen=True)
class Slot:
    """One tensor as a rule sees it."""

    model: ModelFacts
    preset: str
    shape: tuple[int, ...]
    role: str
    count: int  # tensors of this role before it, in the order of the layers
    layer: int  # the same; the number in the name for a model with experts, whose layers hold several
    n: int  # layers; for ATTN_V the number of such tensors
    imatrix: bool

    @property
    def more(self) -> bool:
        """The first and last eighth of the layers and every third between: i < n/8 or i ≥ 7n/8 or (i − n/8) mod 3 = 2."""
        i, n = self.layer, self.n
        return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2

    def first(self, part: int) -> bool:
        """The first 1/part of the layers."""
        return self.layer < self.n // part

    @property
    def middle(self) -> bool:
        """All but the first and last eighth of the layers."""
        return self.n // 8 <= self.layer < 7 * self.n // 8

    @property
    def gqa4(self) -> bool:
        return self.model.n_group >= 4

    @property
    def moe8(self) -> bool:
        return self.model.n_expert == 8

    @property
    def falcon(self) -> bool:
        return self.model.arch == "falcon"

    @property
    def stacked(self) -> bool:
        """A three-dimensional tensor of experts."""
        roles = (FFN_UP, FFN_GATE, FFN_DOWN)
        return len(self.shape) > 2 and self.shape[-3] > 1 and (self.model.arch != "bailingmoe3" or self.role in roles)

    @property
    def fits(self) -> bool:
        """The preset's own type fills the rows."""
        return self.shape[-1] % PRESETS[self.preset].qtype.block_size == 0


class Rule(NamedTuple):
    """presets: names separated by blanks, or a group of them; when: asked of the slot; qtype: None keeps the preset's own type."""

    presets: str
    roles: str
    when: Callable[[Slot], bool]
    qtype: str | None


def always(_: Slot) -> bool:
    return True


# fmt: off
LOW = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M"
LOW_2S = "IQ2_S IQ2_M"
EXPERT = "MXFP4_MOE"
NORMAL = " ".join(name for name in PRESETS if name not in f"{LOW} {EXPERT}".split())
ALL = " ".join(PRESETS)
MOE8_OUTPUT = "Q2_K IQ3_XS IQ3_XXS Q3_K_S Q3_K_M IQ4_NL Q4_K_S Q4_K_M IQ3_S IQ3_M IQ4_XS"  # attn_output of an 8-expert model
ANY_ROLE = " ".join((EMBEDDING, ATTN_V, ATTN_K, ATTN_Q, ATTN_OUTPUT, FFN_UP, FFN_GATE, FFN_DOWN, OTHER))

RULES: Sequence[Rule] = tuple(Rule(*row) for row in (
    # presets                          role          when                                        type
    # the head, and the embeddings where they are the head too
    (EXPERT,                           OUTPUT,       always,                                     "Q8_0"),
    (ALL,                              OUTPUT,       lambda s: s.falcon or not s.fits,           "Q8_0"),
    (f"{LOW} IQ3_XXS",                 OUTPUT,       always,                                     "Q5_K"),
    ("Q8_0",                           OUTPUT,       always,                                     None),
    (ALL,                              OUTPUT,       always,                                     "Q6_K"),
    # only the experts in four bits
    (EXPERT,                           ANY_ROLE,     lambda s: not s.stacked,                    "Q8_0"),
    # embeddings with a head of their own
    ("IQ1_S IQ1_M IQ2_XXS IQ2_XS",     EMBEDDING,    always,                                     "Q2_K"),
    ("IQ2_S IQ2_M IQ3_XXS",            EMBEDDING,    always,                                     "IQ3_S"),
    ("TQ1_0 TQ2_0",                    EMBEDDING,    always,                                     "Q4_K"),
    # attn_v, also inside attn_qkv and attn_kv_b: small under GQA, and every error in it reaches the output
    (LOW,                              ATTN_V,       lambda s: s.gqa4 or s.model.n_expert >= 4,  "Q4_K"),
    (LOW_2S,                           ATTN_V,       always,                                     "IQ3_S"),
    (LOW,                              ATTN_V,       always,                                     "Q2_K"),
    (NORMAL,                           ATTN_V,       lambda s: s.moe8,                           "Q8_0"),
    ("Q2_K Q2_K_S IQ3_XXS IQ3_XS IQ3_S", ATTN_V,     lambda s: s.gqa4,                           "Q4_K"),
    ("IQ4_NL IQ4_XS",                  ATTN_V,       lambda s: s.gqa4,                           "Q5_K"),
    ("Q2_K",                           ATTN_V,       always,                                     "Q3_K"),
    ("IQ3_XXS",                        ATTN_V,       lambda s: not s.imatrix,                    "IQ3_S"),
    ("Q3_K_M",                         ATTN_V,       lambda s: s.count < 2,                      "Q5_K"),
    ("Q4_K_S",                         ATTN_V,       lambda s: s.count < 4,                      "Q5_K"),
    ("Q3_K_M IQ3_M",                   ATTN_V,       always,                                     "Q4_K"),
    ("Q3_K_L",                         ATTN_V,       always,                                     "Q5_K"),
    ("Q4_K_M Q5_K_M",                  ATTN_V,       lambda s: s.more,                           "Q6_K"),
    # attn_k, attn_q
    (LOW,                              ATTN_K,       lambda s: s.moe8,                           "Q4_K"),
    (NORMAL,                           ATTN_K,       lambda s: s.moe8,                           "Q8_0"),
    ("IQ3_XS",                         "attn_k attn_q", always,                                  "IQ3_XXS"),
    ("IQ3_XXS",                        "attn_k attn_q", always,                                  "IQ2_S"),
    # ffn_down
    (LOW_2S,                           FFN_DOWN,     lambda s: s.count < s.n // 8,               "IQ3_S"),
    (LOW,                              FFN_DOWN,     lambda s: s.count < s.n // 8,               "Q2_K"),
    ("Q2_K",                           FFN_DOWN,     always,                                     "Q3_K"),
    ("Q2_K_S IQ3_M",                   FFN_DOWN,     lambda s: s.first(8),                       "Q4_K"),
    ("IQ3_M",                          FFN_DOWN,     lambda s: s.moe8 and s.more,                "Q4_K"),
    ("IQ3_XXS",                        FFN_DOWN,     lambda s: s.imatrix,                        None),
    ("IQ3_XXS",                        FFN_DOWN,     lambda s: s.first(8),                       "Q4_K"),
    ("IQ3_XXS",                        FFN_DOWN,     always,                                     "Q3_K"),
    ("Q3_K_M",                         FFN_DOWN,     lambda s: s.first(16),                      "Q5_K"),
    ("Q3_K_M",                         FFN_DOWN,     lambda s: not s.falcon or s.more,           "Q4_K"),
    ("Q3_K_L",                         FFN_DOWN,     lambda s: s.falcon,                         "Q4_K"),
    ("Q3_K_L",                         FFN_DOWN,     always,                                     "Q5_K"),
    ("Q4_K_S",                         FFN_DOWN,     lambda s: not s.falcon and s.first(8),      "Q5_K"),
    ("Q4_K_M",                         FFN_DOWN,     lambda s: s.falcon and s.first(16),         "Q6_K"),
    ("Q4_K_M",                         FFN_DOWN,     lambda s: s.falcon and s.more,              "Q5_K"),
    ("Q4_K_M Q5_K_M",                  FFN_DOWN,     lambda s: s.more,                           "Q6_K"),
    ("IQ4_NL IQ4_XS",                  FFN_DOWN,     lambda s: not s.imatrix and s.first(8),     "Q5_K"),
    ("Q4_0",                           FFN_DOWN,     lambda s: s.imatrix and s.first(8),         "Q4_1"),
    ("Q5_0",                           FFN_DOWN,     lambda s: s.imatrix and s.first(8),         "Q5_1"),
    # attn_output
    (LOW,                              ATTN_OUTPUT,  lambda s: s.moe8,                           "Q5_K"),
    ("IQ1_S IQ1_M",                    ATTN_OUTPUT,  always,                                     "IQ2_XXS"),
    (LOW_2S,                           ATTN_OUTPUT,  always,                                     "IQ3_S"),
    ("Q3_K_L",                         ATTN_OUTPUT,  lambda s: s.falcon,                         "Q4_K"),
    (NORMAL,                           ATTN_OUTPUT,  lambda s: s.falcon,                         None),
    (MOE8_OUTPUT,                      ATTN_OUTPUT,  lambda s: s.moe8,                           "Q5_K"),
    (NORMAL,                           ATTN_OUTPUT,  lambda s: s.moe8,                           None),
    ("Q2_K",                           ATTN_OUTPUT,  always,                                     "Q3_K"),
    ("IQ3_XXS",                        ATTN_OUTPUT,  always,                                     "IQ3_S"),
    ("Q3_K_M IQ3_M",                   ATTN_OUTPUT,  always,                                     "Q4_K"),
    ("Q3_K_L",                         ATTN_OUTPUT,  always,                                     "Q5_K"),
    # ffn_up, ffn_gate
    ("IQ3_XS",                         "ffn_up ffn_gate", lambda s: s.middle,                    "IQ3_XXS"),
))
# fmt: on


def _indexed(rules: Iterable[Rule]) -> Mapping[tuple[str, str], list[Rule]]:
    """(preset, role) → its rules in order."""
    index: dict[tuple[str, str], list[Rule]] = {}
    for rule in rules:
        for preset in rule.presets.split():
            for role in rule.roles.split():
                index.setdefault((preset, role), []).append(rule)
    return index


_RULES = _indexed(RULES)
_LAYER = re.compile(r"blk\.(\d+)\.")
BUMP_70B = {"Q3_K": "Q5_K", "Q4_K": "Q5_K"}  # attn_v of a 70B model is 8 times smaller than attn_q: more bits cost little


def preset_name(name: str) -> str:
    """The preset's own name for any case and for the aliases Q3_K, Q4_K, Q5_K; UsageError with the list otherwise."""
    upper = name.upper()
    upper = ALIASES.get(upper, upper)
    if upper not in PRESETS:
        raise UsageError(
            f"unknown quantization {name!r}, expected one of {', '.join(PRESETS)}. Presets are named as in llama-quantize: "
            f"try `--types Q4_K_M,Q6_K`."
        )
    return upper


def parse_override(text: str) -> Override:
    """``regex=type`` as llama-quantize reads it: up to the first "=", the pattern in lower case."""
    pattern, _, name = text.partition("=")
    if not pattern or not name:
        raise UsageError(f"tensor type {text!r}: expected regex=type, for example `--tensor-type ffn_down=Q6_K`.")
    try:
        re.compile(pattern.lower())
    except re.error as error:
        raise UsageError(
            f"tensor type {text!r}: {pattern.lower()!r} is no regular expression ({error}). Quote it for the shell and escape dots and "
            rf"brackets: `--tensor-type 'blk\.(0|1)\.attn_v=Q8_0'`."
        ) from None
    return Override(pattern.lower(), qtype(name))


def unmatched_overrides(overrides: Sequence[Override], names: Iterable[str]) -> list[Override]:
    """Overrides that no tensor name contains, probably misspelt; llama-quantize says nothing about them."""
    listed = list(names)
    return [o for o in overrides if not any(map(o.matches, listed))]


def facts_from_gguf(metadata: Mapping[str, Any]) -> ModelFacts:
    """The facts of any architecture from a GGUF header; per-layer numbers count for layer 0, absent ones 0."""
    arch = str(metadata.get("general.architecture", ""))

    def number(key: str, default: int = 0) -> int:
        value = metadata.get(f"{arch}.{key}", default)
        return int(value if isinstance(value, int | float) else value[0])

    n_head = number("attention.head_count")
    return ModelFacts(arch, number("block_count"), n_head, number("attention.head_count_kv", n_head), number("expert_count"))


def assign_types(preset: str, tensors: Iterable[TensorShape], model: ModelFacts, options: Options = Options()) -> dict[str, QuantType]:
    """The type llama-quantize gives each tensor, in the order given.

    preset: a name of PRESETS, any case.  Raises UsageError for an unknown preset, and for overrides with F32, F16 or BF16, which
    llama-quantize ignores there.
    """
    name = preset_name(preset)
    base = PRESETS[name].qtype
    if options.overrides and not base.is_quantized:
        raise UsageError(
            f"tensor types were given with the preset {name}, but llama-quantize applies them to quantized presets only. "
            f"Choose one, e.g. `--type Q8_0`, and name the tensors that stay {name}."
        )
    order = list(tensors)
    run = _Run(name, model, options, order)
    types = {t.name: run.place(t) for t in sorted(order, key=layer_order)}
    return {t.name: types[t.name] for t in order}


def role_of(name: str) -> str:
    """What the tensor does, as far as the presets tell roles apart."""
    return ROLE_BY_NAME.get(name) or next((role for part, role in ROLE_BY_PART if part in name), OTHER)


def is_quantizable(tensor: TensorShape, arch: str) -> bool:
    """A matrix or a stack of matrices named ``*weight`` that is not in KEPT."""
    name, shape = tensor.name, tensor.shape
    while len(shape) > 1 and shape[0] == 1:  # ggml counts dimensions without the outer ones of size 1
        shape = shape[1:]
    kept = (*KEPT, *KEPT_BY_ARCH.get(arch, ()))
    return len(shape) >= 2 and name.endswith("weight") and name not in KEPT_NAMES and not any(part in name for part in kept)


def fallback(wanted: QuantType, n_per_row: int) -> QuantType:
    """``wanted`` where its blocks fill the row, else the type of FALLBACK, else F16."""
    if n_per_row % wanted.block_size == 0:
        return wanted
    smaller = QTYPES[FALLBACK.get(wanted.name, wanted.name)]
    return smaller if n_per_row % smaller.block_size == 0 else QTYPES["F16"]


def layer_order(tensor: TensorShape) -> tuple[int, bytes]:
    """llama.cpp's order, in which the rules count: by layer, tensors outside the layers first, then by name."""
    match = _LAYER.match(tensor.name)
    return int(match[1]) if match else -1, tensor.name.encode("utf-8", "surrogateescape")


@dataclass
class _Run:
    """One pass over the tensors in layer order; the rules count the tensors of each role as they come."""

    preset: str
    model: ModelFacts
    options: Options
    tensors: Sequence[TensorShape]
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        roles = Counter(role_of(t.name) for t in self.tensors)
        self.tied = not roles[OUTPUT]
        self.n_attn_v = roles[ATTN_V]

    def place(self, tensor: TensorShape) -> QuantType:
        """The tensor's type."""
        base, role, options = PRESETS[self.preset].qtype, role_of(tensor.name), self.options
        if not is_quantizable(tensor, self.model.arch) or (options.leave_output and role == OUTPUT):
            return tensor.qtype
        manual = next((o.qtype for o in options.overrides if o.matches(tensor.name)), None)
        if options.embedding_type and role == EMBEDDING and not (manual and tensor.name.startswith("per_layer")):
            return options.embedding_type
        if options.output_type and role == OUTPUT:
            return options.output_type
        if not base.is_quantized:
            return base
        wanted = manual or (base if options.pure else self._by_rules(tensor, role))
        return fallback(wanted, tensor.shape[-1])

    def _by_rules(self, tensor: TensorShape, role: str) -> QuantType:
        base, arch = PRESETS[self.preset].qtype, self.model.arch
        if any(part in tensor.name for part in Q8_BY_ARCH.get(arch, ())):
            return QTYPES["Q8_0"]
        if self.tied and role == EMBEDDING:
            role = OUTPUT
            if self.options.output_type:
                return self.options.output_type
        slot = self._slot(tensor, role)
        chosen = base.name
        for rule in _RULES.get((self.preset, role), ()):
            if rule.when(slot):
                chosen = rule.qtype or chosen
                break
        if role == ATTN_V and self.model.is_70b and self.preset in NORMAL.split():
            chosen = BUMP_70B.get(chosen, chosen)
        return QTYPES[chosen]

    def _slot(self, tensor: TensorShape, role: str) -> Slot:
        count = self.seen[role]
        self.seen[role] += 1
        layer = count
        if role in (FFN_UP, FFN_GATE, FFN_DOWN) and self.model.n_expert > 1:
            layer = max(layer_order(tensor)[0], 0)
        n = self.n_attn_v if role == ATTN_V else self.model.n_layer
        return Slot(self.model, self.preset, tensor.shape, role, count, layer, n, self.options.imatrix)
