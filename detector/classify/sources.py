"""Where a classifier's pictures come from: the formats that a recipe may name.

A format is one file of this folder: a settings section with a `load` method, listed in `PicturesSource`.
"""

from typing import Annotated

from pydantic import Field

from .cifar import CifarSource
from .folder import FolderSource
from .objects import ObjectsSource
from .shapes import ShapesSource

PicturesSource = Annotated[
    FolderSource | CifarSource | ObjectsSource | ShapesSource, Field(discriminator="format")
]
