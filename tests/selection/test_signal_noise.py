"""Spectrum's signal-to-noise ratio, by hand and on real shapes."""

import math

import pytest
import torch

from irtune.config import ModelConfig
from irtune.models import load_classifier
from irtune.selection.signal_noise import layer_ratios, signal_to_noise

pytestmark = pytest.mark.quick


def test_by_hand():
    # Singular values 9, 4, 2, 1, 0: quartiles 1 and 4, sigma = 3 / 1.349 = 2.2239, beta = 1, threshold = 4.4477.
    # Above: 9; below: 4 + 2 + 1 + 0 = 7; divided by the largest: 9 / 7 / 9.
    assert signal_to_noise(torch.diag(torch.tensor([2.0, 9.0, 0.0, 1.0, 4.0]))) == pytest.approx(1 / 7, rel=1e-5)


def test_beta_is_the_ratio_of_the_dimensions():
    # 2 x 8: singular values 5 and 3, quartiles 3.5 and 4.5, threshold 1 / 1.349 * (1 + sqrt(1/4)) = 1.112: no noise.
    wide = torch.zeros(2, 8)
    wide[0, 0], wide[1, 1] = 5.0, 3.0
    assert signal_to_noise(wide) == math.inf
    assert signal_to_noise(torch.zeros(3, 4)) == 0


def test_signal_stands_out_of_noise():
    torch.manual_seed(0)
    noise = torch.randn(64, 48)
    signal = noise + 30 * torch.outer(torch.randn(64), torch.randn(48)) / math.sqrt(64)
    assert signal_to_noise(signal) * float(torch.linalg.matrix_norm(signal, 2)) > signal_to_noise(noise) * float(
        torch.linalg.matrix_norm(noise, 2)
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_every_linear_module_of_every_layer_has_a_ratio(request, kind):
    folder = request.getfixturevalue(kind)
    classifier = load_classifier(ModelConfig(name_or_path=str(folder), dtype="float32"), ["a", "b"])
    ratios = layer_ratios(classifier.model, classifier.anatomy)
    assert len(ratios) == {"llama": 7, "gpt2": 4, "bert": 6}[kind]
    assert all(len(values) == 6 and all(value > 0 for value in values) for values in ratios.values())
