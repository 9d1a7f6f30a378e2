"""Classification of sequences and tokens with a FlexMoE: a new linear head on the decoder's last hidden states.

The parameters and outputs are those of the other families in transformers (`GenericForSequenceClassification`).
`import flexmoe` registers both with the Auto classes. Does not cover loading them as remote code, without the package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig
from flexmoe.modeling.modeling_flexmoe import FlexMoeModel


class FlexMoeForSequenceClassification(FlexMoeModel):
    """Classifies each sequence by its last token that is not padding.

    Example:
        model = AutoModelForSequenceClassification.from_pretrained("path/to/model", num_labels=3)
    """

    _auto_class = None  # not saved as remote code

    def __init__(self, config: FlexMoeConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(  # type: ignore[override]  # labels, as in transformers
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """As `FlexMoeModel.forward`. `labels` are classes [batch] (or values, for a regression) for `loss`.

        Raises:
            ValueError: a batch without a padding token in the config, so that its last tokens are not known.
        """
        out, added = _decode(self, input_ids, attention_mask, inputs_embeds, **kwargs)
        logits_BSL = self.score(out.last_hidden_state)
        pooled_BL = logits_BSL[torch.arange(len(logits_BSL)), self._last_tokens(input_ids, logits_BSL)]
        loss = None
        if labels is not None:
            loss = added + self.loss_function(
                logits=logits_BSL, labels=labels, pooled_logits=pooled_BL, config=self.config
            )
        result = SequenceClassifierOutputWithPast(
            loss, pooled_BL, out.past_key_values, out.hidden_states, out.attentions
        )
        return self._returned(result, return_dict)

    def _last_tokens(self, input_ids: Tensor | None, logits_BSL: Tensor) -> Tensor | int:
        """The position of each sequence's last token that is not padding, on either side."""
        padding = self.config.get_text_config().pad_token_id
        if padding is None and len(logits_BSL) != 1:
            raise ValueError("A batch of sequences needs model.config.pad_token_id, which tells padding from text.")
        if padding is None or input_ids is None:
            return -1
        is_text_BS = (input_ids != padding).to(logits_BSL.device, torch.int32)
        return (torch.arange(is_text_BS.shape[1], device=is_text_BS.device) * is_text_BS).argmax(-1)


class FlexMoeForTokenClassification(FlexMoeModel):
    """Classifies each token.

    Example:
        model = AutoModelForTokenClassification.from_pretrained("path/to/model", num_labels=9)
    """

    _auto_class = None

    def __init__(self, config: FlexMoeConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        dropouts = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((p for p in dropouts if p is not None), 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)

    def forward(  # type: ignore[override]  # labels, as in transformers
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple:
        """As `FlexMoeModel.forward`. `labels` are classes [batch, sequence], -100 where none counts, for `loss`."""
        out, added = _decode(self, input_ids, attention_mask, inputs_embeds, **kwargs)
        logits_BSL = self.score(self.dropout(out.last_hidden_state))
        loss = None if labels is None else added + self.loss_function(logits_BSL, labels, self.config)
        return self._returned(TokenClassifierOutput(loss, logits_BSL, out.hidden_states, out.attentions), return_dict)


def _decode(
    model: FlexMoeModel,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    **kwargs: Any,
) -> tuple[MoeModelOutputWithPast, Tensor | float]:
    """The decoder's output, and what its routers add to a loss."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds, **kwargs}
    out, context = model._run(model.anchor.base_model, MoeModelOutputWithPast, **inputs)
    return out, model._router_losses(out, context)[0]


__all__ = ["FlexMoeForSequenceClassification", "FlexMoeForTokenClassification"]
