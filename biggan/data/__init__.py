"""Images for training: folders, archives, databases, packed files, and faces drawn by the program itself."""

from biggan.data.dataset import ImageDataset
from biggan.data.faces import draw_face, drawn_faces
from biggan.data.loading import open_images

__all__ = ["ImageDataset", "draw_face", "drawn_faces", "open_images"]
