"""Tiny packed tasks, made once, and a configuration that trains on one of them in a second."""

import pytest
import torch
from tiny_hrrformer import pack_image, pack_text, tiny_text_config


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    return pack_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_image(tmp_path_factory):
    return pack_image(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny_config(tmp_path, tiny_text):
    return tiny_text_config(tiny_text, tmp_path / "run")
