"""Text: where samples come from, how they are tokenized and how they are batched."""
