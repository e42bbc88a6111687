"Feature extractors with trained weights, copies, and how often an interval holds what it promises."

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

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


def images(n, seed, size=8):
    "Random images, and their pixels as an embedding that a mirror changes."
    pixels = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


class Pixels:
    "Embeds images as their centered pixels."

    def embed_images(self, pictures):
        return np.stack([np.asarray(p, float).ravel() - 127.5 for p in pictures])


@pytest.mark.parametrize('m', [20, 300])
def test_a_model_that_does_not_copy_is_rarely_accused(m):
    "With the counting of before, 14 % (300 test images) to 65 % (20) of these reports accuse the model."
    from flowerdiff.evaluation.metrics import near_copies

    rng = np.random.default_rng(m)
    alarms = [near_copies(rng.normal(size=200), rng.normal(size=m)).low > 0 for _ in range(300)]
    assert np.mean(alarms) < 0.05  # 2.5 % are allowed


def test_the_share_of_copies_is_found():
    from flowerdiff.evaluation.metrics import near_copies

    rng = np.random.default_rng(0)
    distances = np.concatenate([rng.uniform(1, 2, 270), np.zeros(30)])
    share = near_copies(distances, rng.uniform(1, 2, 300))
    assert 0.05 < share.low <= 0.1 <= share.high < 0.16
    assert near_copies(np.ones(5), np.ones(5)).high < 0.5  # equal distances are no copies


@pytest.mark.parametrize('mirrored', [False, True])
def test_copies_and_mirrored_copies_are_found(mirrored):
    from flowerdiff.evaluation.measure import ClipMetrics, Measurements, _add_copies, embed_mirrored

    train = images(60, 1)
    drawn = [ImageOps.mirror(image) if mirrored else image for image in train[:20]]
    sets = dict(drawn=drawn, test=images(40, 2), real=images(20, 3), copies=train[20:40])
    clip = Pixels()
    found = Measurements(clip=ClipMetrics([], []))
    embeddings = {name: clip.embed_images(pictures) for name, pictures in sets.items()}
    _add_copies(found, embeddings, embed_mirrored(clip, sets), clip.embed_images(train))
    assert found.metrics['copies'].low > 0.7
    assert {(n.training, n.mirrored) for n in found.clip.nearest} == {
        (n.generated, mirrored) for n in found.clip.nearest
    }


def test_fid_has_an_excess_that_covers_the_truth_and_no_interval_of_its_own():
    from flowerdiff.evaluation.metrics import fid, fid_excess
    from flowerdiff.stages.evaluate import to_json

    rng = np.random.default_rng(0)

    def normal(shift=0.0):
        return rng.normal(shift, 1, (60, 4))

    for shift in (0.0, 0.5):
        excess = [fid_excess(normal(shift), normal(), normal(), seed=i) for i in range(40)]
        assert np.mean([e.low <= 4 * shift**2 <= e.high for e in excess]) > 0.85
    value = fid(normal(), normal())
    assert value.value > 0.1  # its bias: the truth is 0
    assert to_json(value) == dict(value=round(value.value, 6), n=60)
