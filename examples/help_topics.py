"""Real text that Python ships: the topics behind `help()`, about half a megabyte. Read as bytes, so no tokenizer is needed."""

from __future__ import annotations

import pydoc_data.topics
import random

TOPICS: dict[str, str] = pydoc_data.topics.topics
BYTES = 256  # the number of tokens


def passages(length: int) -> list[list[int]]:
    """All of it, in passages of `length` tokens."""
    text = list("\n\n".join(TOPICS[name] for name in sorted(TOPICS)).encode())
    return [text[start : start + length] for start in range(0, len(text) - length + 1, length)]


def labelled_passages(topics: int, length: int, most: int | None = None) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Passages of the longest topics, labelled by topic: a training and a test set, 9 to 1, of {"input_ids", "label"}.

    most: the number of passages; None for all.
    """
    longest = sorted(TOPICS.values(), key=len, reverse=True)[:topics]
    found: list[dict[str, object]] = []
    for label, topic in enumerate(longest):
        tokens = list(topic.encode())
        starts = range(0, len(tokens) - length + 1, length)
        found += [{"input_ids": tokens[start : start + length], "label": label} for start in starts]
    random.Random(0).shuffle(found)
    found = found[:most]
    return found[len(found) // 10 :], found[: len(found) // 10]
