"""The causal network of a recipe that learns sequences."""

from typing import Any

from ..models import Decoder

__all__ = ["decoder"]


def decoder(recipe: Any, num_tokens: int, max_tokens: int) -> Decoder:
    """With random weights.

    Args:
        recipe: with mechanism, model_args, dropout and drop_path.
        num_tokens, max_tokens: see Decoder.

    Raises:
        ValueError: model_args hold a word that the network does not take.
    """
    words: dict[str, Any] = {"max_tokens": max_tokens, "drop": recipe.dropout}
    if recipe.drop_path:
        words["drop_path_rate"] = recipe.drop_path
    try:
        return Decoder(num_tokens, mechanism=recipe.mechanism or "softmax", **words | recipe.model_args)
    except TypeError as error:
        raise ValueError(
            f"model_args: expected words that the decoder takes, got {' '.join(str(error).split())}; check "
            "them"
        ) from None
