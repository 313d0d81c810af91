"""The parameter tree of branch `optimized` of the official Transformer-VQ: all layers stacked, with quantized keys or without.

Norms have no parameters there, keys, values and gates a kernel each; our unit holds the rows of the three in one weight.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vqkit.compat.config import OfficialSettings
from vqkit.compat.official_tree import Place, at, check_stated, shape_of
from vqkit.models.config import ModelConfig
from vqkit.models.presets import official_optimized
from vqkit.quantizers.config import CodebookConfig

PREFIX = "stack/"
_KINDS = {"vq": "VQAttention", "full": "FullAttention"}
_PROJECTIONS = "qkvg_producer"
_POSITIONS = "xl_bias_producer"
_FEED_FORWARD = f"{PREFIX}MultiLayerPerceptron_0"


def demands(config: ModelConfig) -> list[tuple[str, object, bool]]:
    """Options that a model of this branch has one value of: name, value, and whether it is that."""
    return [
        ("heads", config.heads, config.layer != "gated" or config.heads == 1),
        ("mem_len", config.mem_len, config.attention != "vq" or config.mem_len == config.block_len),
        ("cache", config.cache, config.cache),
        ("input", config.input, config.input == "tokens"),
        ("quantizer", config.quantizer, config.quantizer == "learnable"),
        ("relative_positions", config.relative_positions, config.relative_positions),
        ("tied_bias", config.tied_bias, not config.tied or not config.tied_bias),
        ("logit_scale_at", config.logit_scale_at, config.logit_scale_at == "input" or config.logit_scale == 1.0),
    ]


def parameter_places(config: ModelConfig) -> dict[str, Place]:
    """Our name of each parameter, and its place."""
    places = {"embedding.weight": at("token_embed/embedding")}
    if config.absolute_positions:
        places["positions.scale"] = at("pos_embed/scale")
    for ours, official, layer in _unit_names(config):
        places |= _unit_places(config, ours, official, layer)
    if config.layer == "feed_forward":
        for i in range(config.layers):
            for name, dense in (("up", "Dense_0"), ("down", "Dense_1")):
                places[f"layers.{i}.feed_forward.{name}.weight"] = at(f"{_FEED_FORWARD}/{dense}/kernel", True, i)
    if not config.tied:
        places |= {"logits.weight": at("out_proj/kernel", True), "logits.bias": at("out_proj/bias")}
    return places


def codebook_places(config: ModelConfig) -> dict[str, Place]:
    """Our name of each buffer of the codebooks, and its place; none with ordinary attention."""
    if config.attention == "full":
        return {}
    return {
        f"{ours}.quantizer.{name}": at(f"{official}/quantizer/{key}", False, layer)
        for ours, official, layer in _unit_names(config)
        for name, key in (("sum", "c_sum"), ("count", "c_count"))
    }


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every array, by its key."""
    dim, heads = config.dim, config.num_key_heads
    queries, keys, values = config.heads * config.key_dim, heads * config.key_dim, heads * config.value_dim
    unit: dict[str, tuple[int, ...]] = {
        f"{_PROJECTIONS}/q_proj/kernel": (dim, queries),
        f"{_PROJECTIONS}/k_proj/kernel": (dim, keys),
        f"{_PROJECTIONS}/v_proj/kernel": (dim, values),
        f"{_PROJECTIONS}/g_proj/kernel": (dim, config.heads * config.value_dim),
        f"{_POSITIONS}/xl_r_proj/kernel": (dim, keys),
        f"{_POSITIONS}/xl_u": (queries,),
        f"{_POSITIONS}/xl_v": (queries,),
        "res_proj/kernel": (config.heads * config.value_dim, dim),
        "quantizer/c_sum": (heads, config.codebook_size, config.key_dim),
        "quantizer/c_count": (heads, config.codebook_size),
    }
    every: dict[str, tuple[int, ...]] = {
        "token_embed/embedding": (config.vocab_size, dim),
        "pos_embed/scale": (),
        "out_proj/kernel": (dim, config.vocab_size),
        "out_proj/bias": (config.vocab_size,),
    }
    every |= {f"{official}/{key}": (config.layers, 1, *shape) for _, official, _ in _unit_names(config) for key, shape in unit.items()}
    width = config.feed_forward_width
    every |= {f"{_FEED_FORWARD}/Dense_{i}/kernel": (config.layers, 1, *shape) for i, shape in enumerate([(dim, width), (width, dim)])}
    places = parameter_places(config) | codebook_places(config)
    there = {key for place in places.values() for key in place.keys}
    return {key: shape for key, shape in every.items() if key in there}


def infer_config(arrays: Mapping[str, Tensor], settings: OfficialSettings) -> ModelConfig:
    """What the shapes tell, the rest from `settings`; raises ValueError for a contradiction."""
    if settings.output_norm is None:
        raise ValueError("output_norm = None: no array of a checkpoint of branch optimized tells it; say what --e_preln of the run was")
    if settings.mem_len not in (None, settings.block_len):
        raise ValueError(f"mem_len = {settings.mem_len}: the window of branch optimized is a block, expected {settings.block_len} or None")
    attention = "vq" if any(key.startswith(f"{PREFIX}{_KINDS['vq']}_0/") for key in arrays) else "full"
    unit = f"{PREFIX}{_KINDS[attention]}_0"
    layers, _, dim, queries = shape_of(arrays, f"{unit}/{_PROJECTIONS}/q_proj/kernel", 4)
    values = shape_of(arrays, f"{unit}/{_PROJECTIONS}/v_proj/kernel", 4)[3]
    key_dim, key_heads = _keys(arrays, unit, queries, settings)
    gated = f"{unit}/{_PROJECTIONS}/g_proj/kernel" in arrays
    for name, size, divisor in (("q_proj", queries, key_dim), ("v_proj", values, key_heads)):
        key = f"{unit}/{_PROJECTIONS}/{name}/kernel"
        if size % divisor:
            raise ValueError(f"key {key!r} has shape {tuple(arrays[key].shape)}, expected a multiple of {divisor} at the end")
    tied = "out_proj/kernel" not in arrays
    heads = queries // key_dim
    options = {} if attention == "full" else {"codebook_size": shape_of(arrays, f"{unit}/quantizer/c_sum", 5)[3]}
    return official_optimized(
        "shga" if gated else "mha",
        dim=dim,
        key_dim=key_dim,
        block_len=settings.block_len,
        vocab_size=shape_of(arrays, "token_embed/embedding", 2)[0],
        layers=layers,
        heads=heads,
        key_heads=None if key_heads == heads else key_heads,
        value_dim=values // key_heads,
        feed_forward_dim=None if gated else shape_of(arrays, f"{_FEED_FORWARD}/Dense_0/kernel", 4)[3],
        attention=attention,
        cache=settings.cache,
        cache_gradient=settings.cache_gradient,
        input=settings.input,
        absolute_positions="pos_embed/scale" in arrays,
        position_base=settings.position_base,
        tied=tied,
        output_norm=settings.output_norm,
        logit_scale=settings.logit_scale,
        codebook=CodebookConfig(decay=settings.decay),
        **settings.dropouts,
        **options,
    )


def _keys(arrays: Mapping[str, Tensor], unit: str, queries: int, settings: OfficialSettings) -> tuple[int, int]:
    """Width and number of the key heads. A codebook tells them, or that there are fewer keys than queries, which is one head."""
    c_sum, k_proj = f"{unit}/quantizer/c_sum", f"{unit}/{_PROJECTIONS}/k_proj/kernel"
    shape = shape_of(arrays, k_proj, 4)
    if unit.endswith(f"{_KINDS['vq']}_0"):
        sums = shape_of(arrays, c_sum, 5)
        check_stated("key_dim", settings.key_dim, sums[4], c_sum, sums)
        return sums[4], sums[2]
    if shape[3] < queries or f"{unit}/{_PROJECTIONS}/g_proj/kernel" in arrays:
        check_stated("key_dim", settings.key_dim, shape[3], k_proj, shape)
        return shape[3], 1
    if settings.key_dim is None:
        raise ValueError(
            "key_dim = None: no array of ordinary multi-head attention tells the width of a head; say what --d_k of the run was"
        )
    if shape[3] % settings.key_dim:
        raise ValueError(f"key_dim = {settings.key_dim}: key {k_proj!r} has shape {shape}, expected a divisor of {shape[3]}")
    return settings.key_dim, shape[3] // settings.key_dim


def _unit_places(config: ModelConfig, ours: str, official: str, layer: int) -> dict[str, Place]:
    gated = config.layer == "gated"
    kernels = tuple(f"{official}/{_PROJECTIONS}/{name}_proj/kernel" for name in ("kvg" if gated else "kv"))
    return {
        f"{ours}.q.weight": at(f"{official}/{_PROJECTIONS}/q_proj/kernel", True, layer),
        f"{ours}.{'kvg' if gated else 'kv'}.weight": Place(kernels, True, layer),
        f"{ours}.r.weight": at(f"{official}/{_POSITIONS}/xl_r_proj/kernel", True, layer),
        f"{ours}.out.weight": at(f"{official}/res_proj/kernel", True, layer),
        f"{ours}.content_bias": at(f"{official}/{_POSITIONS}/xl_u", False, layer),
        f"{ours}.position_bias": at(f"{official}/{_POSITIONS}/xl_v", False, layer),
    }


def _unit_names(config: ModelConfig) -> list[tuple[str, str, int]]:
    """Our name of each attention unit, the official one of its stack, and its layer in there."""
    kind = _KINDS[config.attention]
    return [
        (f"layers.{i}.attention.{j}", f"{PREFIX}{kind}_{j}", i) for i in range(config.layers) for j in range(config.attentions_per_layer)
    ]
