"""Settings of how labelled examples are cleaned before training (Mei 2024, section V-A; Yao-Opt 2024, section 4.1)."""

from typing import Literal

from disttrain.config.section import Positive, Section


class CleaningConfig(Section):
    """Steps of cleaning, each off unless set. Texts are changed in every split, rows are removed from training only."""

    segment: Literal["none", "jieba"] = "none"
    """jieba: cut Chinese text into words, with spaces between them."""
    lowercase: bool = False
    """Write every text in lower case."""
    numbers: Literal["keep", "map"] = "keep"
    """map: write NUM in place of every number in digits."""
    punctuation: Literal["keep", "apart", "remove"] = "keep"
    """apart: every punctuation mark becomes a word of its own. remove: a space takes its place."""
    min_count: Positive = 1
    """Words that the training split, so far cleaned, has less often become UNK; 1 keeps all."""
    max_words: Positive | None = None
    """Words (between white space) of a text that are kept; null keeps all."""
    missing: Literal["keep", "remove"] = "keep"
    """remove: training rows with an empty text or without a label."""
    duplicates: Literal["keep", "same_label", "same_text"] = "keep"
    """What of equal training rows keeps the first only. same_label: equal texts with equal labels. same_text: equal
    texts, whatever their labels."""
