"""Evaluation: every example counted once, whatever the batches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_hrrformer import SIZES, tiny_text_config

from hrrformer.evaluation import Evaluation, Evaluator, majority_baseline
from hrrformer.learner import build_classifier
from hrrformer.run_setup import fit_to_data, open_data
from runtime.device import Device


@pytest.fixture
def data_and_classifier(tiny_text, tmp_path):
    config = tiny_text_config(tiny_text, tmp_path)
    data = open_data(config)
    torch.manual_seed(0)
    return data, build_classifier(fit_to_data(config, data))


@pytest.mark.parametrize(("batch_size", "buckets"), [(40, ()), (7, ()), (7, (12, 16)), (64, (16,))])
def test_every_example_counts_once(data_and_classifier, batch_size, buckets):
    data, classifier = data_and_classifier
    tokens, labels = data.test.rows(torch.arange(len(data.test)), 24), data.test.labels
    with torch.no_grad():
        logits = classifier.eval()(tokens)
    found = Evaluator(classifier, Device(), batch_size, buckets)(data.test)
    assert classifier.training  # as training wants it back
    assert found.examples == SIZES["test"]
    assert found.accuracy == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    for true in range(2):
        for answer in range(2):
            assert found.confusion[true, answer] == ((labels == true) & (logits.argmax(-1) == answer)).sum()


def test_a_limit_takes_examples_from_all_of_the_split(data_and_classifier):
    """Every third of 40, say; the first ones may all be of one class."""
    data, classifier = data_and_classifier
    chosen = torch.arange(13) * 40 // 13
    with torch.no_grad():
        logits = classifier.eval()(data.validation.rows(chosen, 24))
    found = Evaluator(classifier, Device(), 8)(data.validation, limit=13)
    assert found.confusion.sum(1).tolist() == data.validation.labels[chosen].bincount().tolist()
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, data.validation.labels[chosen])), rel=1e-4)


def test_a_network_may_have_more_outputs_than_the_data_have_classes(tiny_text, tmp_path):
    config = tiny_text_config(tiny_text, tmp_path)
    data = open_data(config)
    config = fit_to_data(replace(config, model=replace(config.model, num_outputs=4)), data)
    found = Evaluator(build_classifier(config), Device(), 8)(data.test)
    assert found.confusion.shape == (4, 4) and found.confusion.sum(1).tolist() == [20, 20, 0, 0]


def test_class_accuracies():
    found = Evaluation(torch.tensor([[3, 1, 0], [2, 2, 0], [0, 0, 0]]), 0.0, 1.0)
    assert found.accuracy == 5 / 8 and found.class_accuracies == [0.75, 0.5, None]


def test_majority_baseline():
    assert majority_baseline(torch.tensor([2, 0, 2, 1, 2])) == (pytest.approx(0.6), 2)
