"""Names of the ways to quantise; no torch."""

from typing import Literal

Method = Literal["fp16", "bf16", "int8-dynamic", "int8-static", "kmeans"]
"""What `disttrain quantize --method` takes."""
