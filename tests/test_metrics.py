"What a metric's notebook cannot show: networks with weights that somebody trained."

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).resolve().parents[2] / 'shared' / 'data'


@pytest.mark.skipif(not (DATA / 'features').is_dir(), reason=f'{DATA}: not there')
def test_squeezenet_tells_flowers_apart():
    "The nearest class mean of its features, learned from Oxford's training split, names the validation split's."
    from flowerdiff.evaluation.feature_extractors import SqueezeNetFeatures

    see = SqueezeNetFeatures(DATA / 'features' / 'squeezenet1_1_fp16.safetensors')
    rows = [r for l in open(DATA / 'flowers' / 'metadata.jsonl') if (r := json.loads(l))['label'] <= 25]

    def split(name):
        chosen = [r for r in rows if r['official_split'] == name]
        x = see([Image.open(DATA / 'flowers' / r['file_name']) for r in chosen])
        return x / np.linalg.norm(x, axis=1, keepdims=True), np.array([r['label'] for r in chosen])

    (x, y), (seen, truth) = split('train'), split('valid')
    means = np.stack([x[y == c].mean(0) for c in range(1, 26)])
    right = ((seen @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(1) + 1 == truth).mean()
    assert len(truth) == 250 and right > 0.88, right
