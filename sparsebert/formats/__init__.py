"""How a pruned weight is stored: formats, to and from dense, and the layer over each."""

from sparsebert.formats.base import Format
from sparsebert.formats.bitmap import Bitmap
from sparsebert.formats.blocks import Blocks
from sparsebert.formats.compact import Compact
from sparsebert.formats.dense import Dense
from sparsebert.formats.parse import FORMATS, parse_format
from sparsebert.formats.semi_structured import SemiStructured
from sparsebert.formats.two_four import TwoFour
from sparsebert.formats.unstructured import Unstructured

__all__ = [
    "FORMATS",
    "Bitmap",
    "Blocks",
    "Compact",
    "Dense",
    "Format",
    "SemiStructured",
    "TwoFour",
    "Unstructured",
    "parse_format",
]
