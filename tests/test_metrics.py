"Feature extractors with trained weights, which the notebooks do not have."

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).resolve().parents[2] / 'shared' / 'data'


@pytest.mark.skipif(not (DATA / 'features').is_dir(), reason=f'{DATA}: not there')
def test_squeezenet_tells_flowers_apart():
    "The nearest class mean of SqueezeNet features, from the training split, classifies the validation split."
    from flowerdiff.evaluation.feature_extractors import SqueezeNetFeatures

    extractor = SqueezeNetFeatures(DATA / 'features' / 'squeezenet1_1_fp16.safetensors')
    lines = (DATA / 'flowers' / 'metadata.jsonl').read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row['label'] <= 25]

    def split(name):
        chosen = [row for row in rows if row['official_split'] == name]
        x = extractor([Image.open(DATA / 'flowers' / row['file_name']) for row in chosen])
        return x / np.linalg.norm(x, axis=1, keepdims=True), np.array([row['label'] for row in chosen])

    train, train_labels = split('train')
    valid, valid_labels = split('valid')
    means = np.stack([train[train_labels == label].mean(0) for label in range(1, 26)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    accuracy = ((valid @ means.T).argmax(1) + 1 == valid_labels).mean()
    assert len(valid_labels) == 250
    assert accuracy > 0.88
