"""The drawn faces: the same bytes everywhere, varied, and with a face in each."""

import hashlib

import numpy as np
import pytest

from biggan.data import draw_face, drawn_faces


def test_bytes_are_fixed():
    digest = hashlib.sha256(b"".join(draw_face(index).tobytes() for index in (0, 1, 2, 1000))).hexdigest()
    assert digest[:16] == "601a584eef43a303"
    assert hashlib.sha256(draw_face(5, 128).tobytes()).hexdigest()[:16] == "873b94b9379a422a"


def test_a_face_depends_on_its_index_alone():
    few, many = drawn_faces(32, 3), drawn_faces(32, 70)
    assert np.array_equal(few.images, many.images[:3])
    assert np.array_equal(many.images[69], draw_face(69, 32))


def test_as_a_dataset():
    faces = drawn_faces(16, 5)
    assert faces.images.shape == (5, 3, 16, 16) and faces.num_classes == 1
    assert faces.fingerprint != drawn_faces(16, 6).fingerprint


@pytest.mark.parametrize("resolution", [8, 32, 64, 100, 256])
def test_resolutions(resolution):
    face = draw_face(3, resolution)
    assert face.shape == (3, resolution, resolution) and face.dtype == np.uint8
    assert face.std() > 20


def test_the_same_face_at_two_resolutions():
    large = draw_face(11, 128).astype(float).reshape(3, 32, 4, 32, 4).mean((2, 4))
    assert np.abs(large - draw_face(11, 32)).mean() < 6


def test_faces_are_varied_and_all_different():
    images = drawn_faces(32, 300).images.numpy().astype(float)
    assert len({image.tobytes() for image in images}) == 300
    spread = images.std(0).mean(0)  # (32, 32)
    assert spread.min() > 15  # every pixel: background, hair, skin, clothes
    skin = images[:, :, 17:19, 10:22].mean((2, 3))  # cheeks and nose
    assert (skin[:, 0] > skin[:, 2]).mean() > 0.95 and skin.mean(1).std() > 25


def test_eyes_are_where_eyes_belong():
    """Whites and pupils make the row of the eyes the one of strongest contrast along x, on average."""
    images = drawn_faces(32, 300).images.numpy().astype(float).mean(1)
    contrast = np.abs(np.diff(images[:, :, 8:24], axis=2)).mean((0, 2))  # (32,) by row
    assert 12 <= contrast.argmax() <= 17


@pytest.mark.parametrize(("index", "resolution"), [(-1, 32), (0, 4)])
def test_impossible_faces_are_refused(index, resolution):
    with pytest.raises(ValueError):
        draw_face(index, resolution)
    with pytest.raises(ValueError):
        drawn_faces(resolution, index + 1 if index < 0 else 1)
