"""disttrain: distributed training of GPT- and BERT-style models that proves itself equal to one process."""

__version__ = "0.1.0"
