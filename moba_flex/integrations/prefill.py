"""A language model as a function of token ids alone, to be exported."""

from torch import Tensor, nn
from transformers import PreTrainedModel


class Prefill(nn.Module):
    """A function from token ids `[B, length]` to the logits of the next token, `[B, V]`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Run the model without a cache."""
        logits: Tensor = self.model(input_ids, use_cache=False, logits_to_keep=1).logits
        return logits[:, 0]
