"""Parts of a head."""

from torch import Tensor

SEGMENTS = (
    "background",
    "skin",
    "eye_white",
    "iris",
    "lips",
    "mouth",
    "brow",
    "beard",
    "hair",
    "cloth",
    "glasses",
)
"""Parts of a head, as the embedded world labels them."""

# Small but telling, and next to one another: eye_white, iris, lips, mouth, brow.
_FEATURES = SEGMENTS.index("eye_white"), SEGMENTS.index("brow")


def is_feature(segments: Tensor) -> Tensor:
    """Where indices into ``SEGMENTS`` are of an eye, a brow or the mouth."""
    return (segments >= _FEATURES[0]) & (segments <= _FEATURES[1])
