"""Evidence: what the tokens so far say about whose text this is, added to the logit of an expert's router row.

One token seldom says whose text it is, the tokens before it do. An expert may have a table of scores s over the
vocabulary: how much more often a token occurs in its owner's text than in public text, as a log ratio. For each decay
g, e_g(t) = sum of g^(t - i) s(x_i) over the tokens i <= t of the sequence, at most `window` of them. In each layer the
expert's logit is then c_0 * (the row's) + <c, e(t)> + a bias, calibrated for that layer. Where little has been read,
sums are small whatever the text, so the bias is another one there: one factor is of a term that fades.

It is a pure function of the token ids. Ids that a KV cache has seen are in a layer of that cache, so whatever
reorders, crops or repeats it does so with them. Padding, and tokens whose ids are unknown, have the score 0.

Does not cover fitting (`flexmoe.routers.evidence`), or what the requests of a continuous batch have read
(`flexmoe.batching`).

Shapes: B batch, S tokens of this pass, Q of them at a time, K tokens so far, T = B * S, D decays, V vocabulary, and
F = D + 1 features: the sums, and what fades.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast

from .configuration_flexmoe import require_flexmoe

UNKNOWN = -1  # the id of a token that was given as an embedding
FADING = 0.8  # per token, of the term that replaces the bias where little has been read
QUERIES = 256  # tokens whose sums are computed at a time

logger = logging.get_logger(__name__)


class EvidenceRow(nn.Linear):
    """A router row [1, H] with a bias, and a calibration [1 + F + 1]: factors of the row and of features, and a bias.

    In the first layer also the table [V] of the expert's scores. Without evidence, the row's own logit is calibrated.
    """

    def __init__(self, hidden_size: int, evidence: Mapping[str, Any], layer: int, **factory: Any) -> None:
        super().__init__(hidden_size, 1, **factory)
        calibration = torch.zeros(calibration_size(evidence), **factory)
        calibration[0] = 1.0
        self.calibration = nn.Parameter(calibration)
        if layer == 0:
            self.register_buffer("table", torch.zeros(evidence["tokens"], **factory))

    def forward(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        """The logits [T, 1] of `x` [T, H]; `features` [T, F] are those of `read_evidence`."""
        logits = super().forward(x)
        if features is None:
            return logits
        row, factors_F, bias = self.calibration[:1], self.calibration[1:-1], self.calibration[-1:]
        return row * logits + (features * factors_F).sum(-1, keepdim=True) + bias


def calibration_size(evidence: Mapping[str, Any]) -> int:
    """The entries of a calibration: factors of the row and of the features, and a bias."""
    return len(evidence["decays"]) + 3


def row_shapes(record: Mapping[str, Any], hidden_size: int, layer: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of an expert's router row in a layer: {"weight": (1, H), "bias": (1,), ...}."""
    shapes: dict[str, tuple[int, ...]] = {"weight": (1, hidden_size), "bias": (1,)}
    if (evidence := record.get("evidence")) is not None:
        shapes["calibration"] = (calibration_size(evidence),)
        if layer == 0:
            shapes["table"] = (evidence["tokens"],)
    return shapes


class _TokenIds:
    """Ids [B, 1, K, 1] of the tokens that a cache has seen, as a further layer of it."""

    def use(self, cache: Any) -> Any:
        """Makes `self` the last layer of `cache`."""
        # masks are made for the first layer of a kind, and an offloaded cache fetches all but the sliding ones
        self.is_sliding = getattr(cache.layers[0], "is_sliding", False) or getattr(cache, "offloading", False)
        cache.layers.append(self)
        return self

    def remember(self, ids_BS: Tensor) -> None:
        """Adds the tokens of a forward pass."""
        ids = ids_BS[:, None, :, None]
        self.update(ids, ids)  # type: ignore[attr-defined]


class GrowingIds(_TokenIds, DynamicLayer):
    """The ids of a cache that grows."""

    def so_far(self, ids_BS: Tensor) -> tuple[Tensor, int]:
        """All ids [B, K], those of this pass last, and the index of its first one."""
        if not self.get_seq_length():
            return ids_BS, 0
        return torch.cat([self.keys[:, 0, :, 0].to(ids_BS.device), ids_BS], 1), self.get_seq_length()


class StaticIds(_TokenIds, StaticLayer):
    """The ids of a cache of a fixed length, whose number of tokens is on the device."""

    def so_far(self, ids_BS: Tensor) -> tuple[Tensor, int | Tensor]:
        """All ids [B, K], zeros after those of this pass, and the index of its first one."""
        if not self.is_initialized:
            return ids_BS, 0
        slots_S = self.cumulative_length + torch.arange(ids_BS.shape[1], device=ids_BS.device)
        return self.keys[:, 0, :, 0].index_copy(1, slots_S, ids_BS), self.cumulative_length


def read_evidence(model: Any, names: Sequence[str], inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The features float32 [T, F] of each expert with a table, for the tokens of a forward pass.

    Args:
        model: the FlexMoE that runs.
        names: the allowed experts.
        inputs: the arguments of the forward pass.

    Raises:
        ValueError: the cache holds tokens whose ids it has not seen.
    """
    records = [record for record in model.config.expert_records if "evidence" in record and record["name"] in names]
    if not records:
        return {}
    ids_BS = token_ids(inputs)
    if inputs.get("read_index") is not None:
        batching = require_flexmoe("batching", "continuous batching")
        window = max(record["evidence"]["window"] for record in records)
        groups, order_T = batching.read_by_requests(model, ids_BS, window)
        parts = [_Read(ids_BK, queries).by_expert(model, records) for ids_BK, queries in groups]
        return {name: torch.cat([part[name] for part in parts])[order_T] for name in parts[0]}
    cache = _self_attention(inputs.get("past_key_values"))
    layer = _layer_of(cache)
    if layer is None and cache is not None and isinstance(length := cache.get_seq_length(), int) and length:
        raise ValueError(
            f"This KV cache holds {length} tokens without their ids, by which {[r['name'] for r in records]} are "
            "chosen: start with a fresh cache, and fill it with this model."
        )
    ids_BK, first = (ids_BS, 0) if layer is None else layer.so_far(ids_BS)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    is_read_BK = ids_BK >= 0
    if isinstance(mask, Tensor) and mask.shape == ids_BK.shape:
        is_read_BK = is_read_BK & mask.bool()
    positions_BS = positions.expand(ids_BS.shape) if positions is not None and positions.dim() == 2 else None
    return _Read(ids_BK, ids_BS.shape[1], first, is_read_BK, positions_BS).by_expert(model, records)


def sequence_features(table_V: Tensor, ids_NL: Tensor, evidence: Mapping[str, Any]) -> Tensor:
    """The features float32 [N * L, F] of whole sequences, for calibration."""
    return _Read(ids_NL, ids_NL.shape[1]).features(table_V, evidence)


def token_ids(inputs: Mapping[str, Any]) -> Tensor:
    """The ids int64 [B, S] of a forward pass; `UNKNOWN` for tokens that are given as embeddings."""
    if (ids_BS := inputs.get("input_ids")) is not None:
        return ids_BS.long()
    logger.warning_once(
        "inputs_embeds are given instead of input_ids: which tokens these are is unknown, so no evidence is read from "
        "them, and experts with evidence are chosen by the hidden states and by what was read before."
    )
    states = inputs["inputs_embeds"]
    return torch.full(states.shape[:2], UNKNOWN, dtype=torch.int64, device=states.device)


def remember_tokens(cache: Any, ids_BS: Tensor) -> None:
    """Adds the ids of a forward pass to the cache that it has filled."""
    cache = _self_attention(cache)
    if cache is None or not cache.layers:
        return
    layer = _layer_of(cache)
    if layer is None:
        length = cache.get_max_length() if cache.is_compileable else -1
        layer = (GrowingIds() if length < 0 else StaticIds(max_cache_len=length)).use(cache)
    layer.remember(ids_BS)


class _Read:
    """Tokens so far, `queries` of them of this pass (the last ones, or from `first` on), and weights of their sums."""

    def __init__(
        self, ids_BK: Tensor, queries: int, first: Any = None, is_read: Any = None, positions: Any = None
    ) -> None:
        self._ids_BK, self._length, self._device = ids_BK, ids_BK.shape[1], ids_BK.device
        self._is_read_BK = ids_BK >= 0 if is_read is None else is_read
        self._first = self._length - queries if first is None else first
        self._queries, self._positions_BS = queries, positions
        self._made: dict[Any, Tensor] = {}

    def by_expert(self, model: Any, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The features [T, F] of each."""
        rows = model.flexmoe_blocks()[0].router
        with torch.no_grad(), maybe_autocast(self._device.type, enabled=False):
            return {r["name"]: self.features(rows[r["name"]].table, r["evidence"]) for r in records}

    def features(self, table_V: Tensor, evidence: Mapping[str, Any]) -> Tensor:
        """The features float32 [T, F]."""
        table_V, ids_BK = table_V.to(self._device), self._ids_BK
        has_score_BK = self._is_read_BK & (ids_BK < len(table_V))
        scores_BK = torch.where(has_score_BK, table_V[ids_BK.clamp(0, len(table_V) - 1)].float(), 0.0)
        sums_TD = self.sums(scores_BK, evidence["decays"], evidence["window"])
        return torch.cat([sums_TD, self.fading(evidence["window"])], 1)

    def fading(self, window: int) -> Tensor:
        """What fades with the tokens that were read, float32 [T, 1]."""
        if window not in self._made:
            self._made[window] = 1 - (1 - FADING) * self.sums(self._is_read_BK.float(), [FADING], window)
        return self._made[window]

    def sums(self, scores_BK: Tensor, decays: Sequence[float], window: int) -> Tensor:
        """The sums float32 [T, D]. Each expert's are computed on their own, so that no bit depends on another."""
        parts = []
        for start in range(0, self._queries, QUERIES):
            end = min(start + QUERIES, self._queries)
            low, high = 0, self._length
            if isinstance(self._first, int):
                low, high = max(0, self._first + start - window + 1), self._first + end
            weights_BNK = self._weights(start, end, low, high, tuple(decays), window)
            sums_BN = (weights_BNK @ scores_BK[:, low:high, None]).squeeze(-1)
            parts.append(sums_BN.unflatten(1, (end - start, len(decays))))
        return torch.cat(parts, 1).flatten(0, 1)

    def _weights(self, start: int, end: int, low: int, high: int, decays: tuple[float, ...], window: int) -> Tensor:
        """[1 or B, Q * D, K] for the tokens `start` to `end` of this pass and `low` to `high` of all."""
        key = (start, decays, window)
        if key not in self._made:
            slots_Q = self._first + torch.arange(start, end, device=self._device)
            distance_QK = slots_Q[:, None] - torch.arange(low, high, device=self._device)
            inside_BQK = ((distance_QK >= 0) & (distance_QK < window))[None]
            if self._positions_BS is not None:  # the sequence of a token may begin later: packed, or padded
                inside_BQK = inside_BQK & (distance_QK <= self._positions_BS[:, start:end, None])
            logs_D1 = torch.tensor([[math.log(decay)] for decay in decays], device=self._device)
            powers_QDK = (distance_QK.clamp(min=0)[:, None] * logs_D1).exp()
            self._made[key] = torch.where(inside_BQK[:, :, None], powers_QDK, 0.0).flatten(1, 2)
        return self._made[key]


def _self_attention(cache: Any) -> Any:
    """The part of a cache that grows with the tokens; None without one."""
    cache = getattr(cache, "self_attention_cache", cache)
    return cache if hasattr(cache, "layers") else None


def _layer_of(cache: Any) -> Any:
    layers = () if cache is None else cache.layers[-1:]
    return next((layer for layer in layers if isinstance(layer, _TokenIds)), None)


__all__ = [
    "EvidenceRow",
    "calibration_size",
    "read_evidence",
    "remember_tokens",
    "row_shapes",
    "sequence_features",
    "token_ids",
]
